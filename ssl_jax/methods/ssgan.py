"""SS-GAN: a GAN whose discriminator also predicts rotations by quarter turns, so that its features do not forget.

Chen et al. 2019, "Self-supervised GANs via auxiliary rotation loss" (arXiv:1811.11212). The discriminator learns rotations from
real images only. The generator is rewarded for images whose rotation the discriminator recognizes: the networks compete on what is
real and cooperate on rotations. With `weights.game` and `weights.generator` 0 the discriminator only predicts rotations (RotNet,
Gidaris et al. 2018, arXiv:1803.07728). The paper's optional self-modulated normalizations come with BigGAN's generator.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.rotation import rotations
from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, ModelFns, Phase, Sampler, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.networks import build_network
from ssl_jax.models.gan.sampler import ema_of_generator, generator_sampler, latent_sampler
from ssl_jax.models.gan.spectral import SpectralDense
from ssl_jax.objectives.adversarial import GAN_LOSSES, diversity, health
from ssl_jax.objectives.classification import cross_entropy

HINGE = GAN_LOSSES["hinge"]


def build(config, stages) -> Method:
    """`config.model`:

    generator, discriminator: networks without labels (see `build_network`).
    latent: kind ('normal' or 'uniform') and size.
    discriminator_steps: n_d; each takes 1 / n_d of the batch, and the generator's step makes as many images.
    rotated: how many images, the last ones of each sub-step, are also seen in all four orientations.
    weights: game, of the adversarial losses; discriminator (the paper's beta) and generator (alpha), of the rotation losses.
    ema: decay of the generator's moving average, which makes the samples, and the step at which averaging starts.
    """
    model, latent = config.model, config.model.latent
    images = config.batch_size // model.discriminator_steps
    if not 0 < model.rotated <= images:
        raise UserError(f"config.model.rotated={model.rotated} must be positive and at most the {images} images of a sub-step")
    views = make_views(config.views)
    size = jax.eval_shape(views, jax.ShapeDtypeStruct((1, *config.data.image_shape), jnp.uint8), jax.random.key(0)).shape[2]
    generator = build_network("generator", model.generator, size, 0, config.dtype)
    discriminator = build_network("discriminator", model.discriminator, size, 0, config.dtype)
    head = SpectralDense(4)
    sample_latents = latent_sampler(latent.kind, latent.size)

    def generate(params, state, key, count):
        return run(generator, params, state, sample_latents(key, count)["z"], train=True)

    def discriminate(params, state, x, train=True):
        """((logits [N], features), new state)"""
        out, net = run(discriminator, params["net"], state["net"], x, train=train)
        return out, {**state, "net": net}

    def rotation_loss(params, state, x):
        """(cross-entropy, accuracy, new state) on the last `rotated` of x in all four orientations."""
        rotated, turns = rotations(x[-model.rotated :])
        (_, features), state = discriminate(params, state, rotated.reshape(-1, *x.shape[1:]))
        logits, head_state = run(head, params["rotation"], state["rotation"], features["pooled"], train=True)
        value, logs = cross_entropy(logits, turns.ravel())
        return value, logs["accuracy"], {**state, "rotation": head_state}

    def init(key, batch, frozen):
        keys = jax.random.split(key, 4)
        x = to_input(views(batch["image"], keys[0])[:, 0], 0.5, 0.5)
        net_g, state_g = create(generator, keys[1], sample_latents(keys[1], len(x))["z"])
        net, net_state = create(discriminator, keys[2], x)
        (_, features), _ = run(discriminator, net, net_state, x, train=True)
        rotation, rotation_state = create(head, keys[3], features["pooled"])
        return (
            {"generator": net_g, "discriminator": {"net": net, "rotation": rotation}},
            {
                "generator": state_g,
                "discriminator": {"net": net_state, "rotation": rotation_state},
                "ema": jax.tree.map(jnp.copy, net_g),
            },
        )

    def discriminator_loss(train, state, batch, key):
        views_key, latents_key = jax.random.split(key)
        real = to_input(views(batch["image"], views_key)[:, 0], 0.5, 0.5)
        fake, _ = generate(state.params["generator"], state.mutable["generator"], latents_key, len(real))
        (on_real, _), new_state = discriminate(train["discriminator"], state.mutable["discriminator"], real)
        (on_fake, _), new_state = discriminate(train["discriminator"], new_state, fake)
        on_rotated, accuracy, new_state = rotation_loss(train["discriminator"], new_state, real)
        value = model.weights.game * HINGE.discriminator(on_real, on_fake) + model.weights.discriminator * on_rotated
        logs = {**health(on_real, on_fake), "diversity": diversity(real, fake)}
        return value, ({"discriminator": new_state}, {**logs, "rotation_loss": on_rotated, "rotation_accuracy": accuracy})

    def generator_loss(train, state, batch, key):
        count = len(batch["image"]) // model.discriminator_steps
        fake, new_g = generate(train["generator"], state.mutable["generator"], key, count)
        (on_fake, _), new_d = discriminate(state.params["discriminator"], state.mutable["discriminator"], fake)
        on_rotated, accuracy, new_d = rotation_loss(state.params["discriminator"], new_d, fake)
        value = model.weights.game * HINGE.generator(on_fake) + model.weights.generator * on_rotated
        logs = {"rotation_loss": on_rotated, "rotation_accuracy": accuracy}
        return value, ({"generator": new_g, "discriminator": new_d}, logs)

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
