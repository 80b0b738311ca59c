"""Generative adversarial networks: a generator maps noise to images, a discriminator tells them from real images.

Goodfellow et al. 2014, "Generative adversarial nets" (arXiv:1406.2661), algorithm 1: n_d steps of the discriminator, then one of
the generator. The config selects what later papers changed: networks (`model.generator`, `model.discriminator`), losses
(`model.game`) and a gradient penalty (`model.penalty`). DCGAN: Radford et al. 2016 (arXiv:1511.06434); WGAN-GP: Gulrajani et al.
2017 (arXiv:1704.00028); SNGAN: Miyato et al. 2018 (arXiv:1802.05957). `encode` returns the features of the discriminator.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, ModelFns, Phase, Sampler, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.networks import build_network
from ssl_jax.models.gan.sampler import ema_of_generator, generator_sampler, latent_sampler
from ssl_jax.objectives.adversarial import GAN_LOSSES, diversity, gradient_penalty, health, r1

PENALTIES = ("none", "gradient_penalty", "r1", "r2")


def build(config, stages) -> Method:
    """`config.model`:

    game: the pair of losses, a key of `GAN_LOSSES`.
    generator, discriminator: networks without labels (see `build_network`).
    latent: kind ('normal' or 'uniform') and size.
    discriminator_steps: n_d; each takes 1 / n_d of the batch.
    fakes: images in a step of the generator, as a multiple of those in a step of the discriminator.
    penalty: name (one of `PENALTIES`) and weight.
    ema: decay of the generator's moving average, which makes the samples, and the step at which averaging starts.
    """
    model, latent = config.model, config.model.latent
    if model.game not in GAN_LOSSES:
        raise UserError(f"config.model.game={model.game!r} is unknown; choose {', '.join(GAN_LOSSES)}")
    if model.penalty.name not in PENALTIES:
        raise UserError(f"config.model.penalty.name={model.penalty.name!r} is unknown; choose {', '.join(PENALTIES)}")
    gan_loss = GAN_LOSSES[model.game]
    views = make_views(config.views)
    size = jax.eval_shape(views, jax.ShapeDtypeStruct((1, *config.data.image_shape), jnp.uint8), jax.random.key(0)).shape[2]
    generator = build_network("generator", model.generator, size, 0, config.dtype)
    discriminator = build_network("discriminator", model.discriminator, size, 0, config.dtype)
    sample_latents = latent_sampler(latent.kind, latent.size)

    def generate(params, state, key, count):
        return run(generator, params, state, sample_latents(key, count)["z"], train=True)

    def discriminate(params, state, x, key=None, train=True):
        return run(discriminator, params, state, x, train=train, key=key)

    def penalty(params, state, real, fake, key):
        def score(x):
            return discriminate(params, state, x, key)[0][0]

        if model.penalty.name == "gradient_penalty":
            return gradient_penalty(score, real, fake, key)
        return r1(score, real if model.penalty.name == "r1" else fake)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 4)
        x = to_input(views(batch["image"], keys[0])[:, 0], 0.5, 0.5)
        params, mutable = {}, {}
        params["generator"], mutable["generator"] = create(generator, keys[1], sample_latents(keys[1], len(x))["z"])
        params["discriminator"], mutable["discriminator"] = create(discriminator, {"params": keys[2], "dropout": keys[3]}, x)
        return params, {**mutable, "ema": jax.tree.map(jnp.copy, params["generator"])}

    def discriminator_loss(train, state, batch, key):
        keys = jax.random.split(key, 5)
        real = to_input(views(batch["image"], keys[0])[:, 0], 0.5, 0.5)
        fake, _ = generate(state.params["generator"], state.mutable["generator"], keys[1], len(real))
        start = state.mutable["discriminator"]
        (on_real, _), new_state = discriminate(train["discriminator"], start, real, keys[2])
        (on_fake, _), new_state = discriminate(train["discriminator"], new_state, fake, keys[3])
        value, logs = gan_loss.discriminator(on_real, on_fake), {**health(on_real, on_fake), "diversity": diversity(real, fake)}
        if model.game == "wasserstein":  # accuracy needs a threshold, which a critic's scores do not have
            del logs["accuracy_real"], logs["accuracy_fake"]
        if model.penalty.name != "none":
            logs["penalty"] = penalty(train["discriminator"], start, real, fake, keys[4])
            value += model.penalty.weight * logs["penalty"]
        return value, ({"discriminator": new_state}, logs)

    def generator_loss(train, state, batch, key):
        keys = jax.random.split(key)
        count = model.fakes * len(batch["image"]) // model.discriminator_steps
        fake, new_g = generate(train["generator"], state.mutable["generator"], keys[0], count)
        (on_fake, _), new_d = discriminate(state.params["discriminator"], state.mutable["discriminator"], fake, keys[1])
        return gan_loss.generator(on_fake), ({"generator": new_g, "discriminator": new_d}, {})

    def discriminate_images(params, mutable, images):
        """(logits [B], features) of images, in inference mode."""
        return discriminate(params["discriminator"], mutable["discriminator"], to_input(images, 0.5, 0.5), train=False)[0]

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(
            Phase("d", ("discriminator",), discriminator_loss, repeat=model.discriminator_steps),
            Phase("g", ("generator",), generator_loss),
        ),
        encode=lambda params, mutable, images: discriminate_images(params, mutable, images)[1],
        views=views,
        after=ema_of_generator(model.ema.decay, model.ema.start),
        fns=ModelFns(discriminate=lambda params, mutable, images: discriminate_images(params, mutable, images)[0]),
        sampler=Sampler(*generator_sampler(generator, sample_latents, latent.kind, config.eval_batch_size)),
        couples_batch=True,
    )
