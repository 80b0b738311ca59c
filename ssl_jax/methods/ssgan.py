"""SS-GAN: a GAN whose discriminator also tells by how many quarter turns an image is rotated, which keeps its features from
forgetting.

Chen et al. 2019, "Self-supervised GANs via auxiliary rotation loss" (arXiv:1811.11212). The head for rotations
learns from real images only, and the generator is rewarded for images whose rotation it sees: the two play against each other about
what is real, and together about what is upright. With `weights.game` and `weights.generator` 0 the discriminator learns to predict
rotations and nothing else (RotNet, Gidaris et al. 2018, arXiv:1803.07728). Self-modulated normalizations, an option of the paper, there
are with BigGAN's networks.
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
from ssl_jax.models.gan.spectral import SpectralDense
from ssl_jax.models.gan_sampler import draw_z, ema_of_generator, generator_sampler
from ssl_jax.objectives.adversarial import GAN_LOSSES, diversity, health
from ssl_jax.objectives.classification import cross_entropy

GAME = GAN_LOSSES["hinge"]


def build(config, stages) -> Method:
    """`config.model`:

    generator, discriminator: networks (see `build_player`), without labels.
    latent: kind ('normal' or 'uniform') and size.
    discriminator_steps: n_d; each takes 1 / n_d of the batch, and so many images does the generator's step make.
    rotated: how many images, the last of each sub-step's, are also seen in all orientations.
    weights: game, of the game for both players; discriminator (the paper's beta) and generator (alpha), of the rotations.
    ema: decay of the averaged generator, which makes the samples, and the step from which it is averaged.
    """
    model, latent = config.model, config.model.latent
    if not 0 < model.rotated <= config.batch_size // model.discriminator_steps:
        raise UserError(
            f"config.model.rotated={model.rotated} must be positive and at most the {config.batch_size // model.discriminator_steps} "
            "images of a sub-step"
        )
    views = make_views(config.views)
    size = jax.eval_shape(views, jax.ShapeDtypeStruct((1, *config.data.image_shape), jnp.uint8), jax.random.key(0)).shape[2]
    generator = build_network("generator", model.generator, size, 0, config.dtype)
    discriminator = build_network("discriminator", model.discriminator, size, 0, config.dtype)
    head = SpectralDense(4)
    latents = draw_z(latent.kind, latent.size)

    def generate(params, state, key, count):
        return run(generator, params, state, latents(key, count)["z"], train=True)

    def discriminate(params, state, x, train=True):
        """((logits [N], features), new state)"""
        out, net = run(discriminator, params["net"], state["net"], x, train=train)
        return out, {**state, "net": net}

    def tell_rotation(params, state, x):
        """(cross-entropy, accuracy, new state) on the last `rotated` of x in all four orientations."""
        turned, turns = rotations(x[-model.rotated :])
        (_, features), state = discriminate(params, state, turned)
        logits, moved = run(head, params["rotation"], state["rotation"], features["pooled"], train=True)
        value, logs = cross_entropy(logits, turns)
        return value, logs["accuracy"], {**state, "rotation": moved}

    def init(key, batch, frozen):
        keys = jax.random.split(key, 4)
        x = to_input(views(batch["image"], keys[0])[:, 0], 0.5, 0.5)
        made, stats = create(generator, keys[1], latents(keys[1], len(x))["z"])
        net, net_state = create(discriminator, keys[2], x)
        (_, features), _ = run(discriminator, net, net_state, x, train=True)
        rotation, rotation_state = create(head, keys[3], features["pooled"])
        return (
            {"generator": made, "discriminator": {"net": net, "rotation": rotation}},
            {
                "generator": stats,
                "discriminator": {"net": net_state, "rotation": rotation_state},
                "ema": jax.tree.map(jnp.copy, made),
            },
        )

    def discriminator_loss(train, state, batch, key):
        of_views, of_latents = jax.random.split(key)
        real = to_input(views(batch["image"], of_views)[:, 0], 0.5, 0.5)
        fake, _ = generate(state.params["generator"], state.mutable["generator"], of_latents, len(real))
        (on_real, _), moved = discriminate(train["discriminator"], state.mutable["discriminator"], real)
        (on_fake, _), moved = discriminate(train["discriminator"], moved, fake)
        on_turned, accuracy, moved = tell_rotation(train["discriminator"], moved, real)
        value = model.weights.game * GAME.discriminator(on_real, on_fake) + model.weights.discriminator * on_turned
        logs = {**health(on_real, on_fake), "diversity": diversity(real, fake)}
        return value, ({"discriminator": moved}, {**logs, "rotation_loss": on_turned, "rotation_accuracy": accuracy})

    def generator_loss(train, state, batch, key):
        count = len(batch["image"]) // model.discriminator_steps
        fake, moved = generate(train["generator"], state.mutable["generator"], key, count)
        (on_fake, _), moved_d = discriminate(state.params["discriminator"], state.mutable["discriminator"], fake)
        on_turned, accuracy, moved_d = tell_rotation(state.params["discriminator"], moved_d, fake)
        value = model.weights.game * GAME.generator(on_fake) + model.weights.generator * on_turned
        logs = {"rotation_loss": on_turned, "rotation_accuracy": accuracy}
        return value, ({"generator": moved, "discriminator": moved_d}, logs)

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
        sampler=Sampler(*generator_sampler(generator, latents, latent.kind, config.eval_batch_size)),
        couples_batch=True,
    )
