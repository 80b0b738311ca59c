"""BigGAN: large batches, large networks, class labels for both players, and samples from truncated latents.

Brock et al. 2019, "Large scale GAN training for high fidelity natural image synthesis" (arXiv:1809.11096). The label of an image
steers the generator's normalizations and is projected on by the discriminator (Miyato and Koyama 2018, arXiv:1802.05637); fakes have
labels drawn uniformly. Samples come from an average of the generator's weights, with batch statistics recomputed for it ("standing
statistics"). The features are those of the discriminator.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, ModelFns, Phase, Sampler, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.networks import NETWORKS, build_network
from ssl_jax.models.gan_sampler import ema_of_generator, generator_inputs, generator_sampler
from ssl_jax.objectives.adversarial import GAN_LOSSES, diversity, health, orthogonality
from ssl_jax.sampling.latents import sample_latents

GAME = GAN_LOSSES["hinge"]
# They judge real and made images at once, and so may have no batch statistics.
DISCRIMINATORS = {"discriminator": {name: NETWORKS["discriminator"][name] for name in ("sngan", "biggan", "biggan_deep")}}


def build(config, stages) -> Method:
    """`config.model`:

    generator, discriminator: networks (see `build_player`).
    latent: kind ('normal' or 'uniform') and size.
    conditional: labels steer both players.
    discriminator_steps: n_d; each takes 1 / n_d of the batch, and so many images does the generator's step make.
    orthogonal: weight of the generator's orthogonal regularization; 0 for none.
    ema: decay of the averaged generator, which makes the samples, and the step from which it is averaged.
    """
    model, latent = config.model, config.model.latent
    classes = config.data.num_classes if model.conditional else 0
    if model.conditional and not classes:
        raise UserError(f"config.model.conditional needs labels, and {config.data.name!r} has none; set it to False")
    views = make_views(config.views)
    size = jax.eval_shape(views, jax.ShapeDtypeStruct((1, *config.data.image_shape), jnp.uint8), jax.random.key(0)).shape[2]
    generator = build_network("generator", model.generator, size, classes, config.dtype)
    discriminator = build_network("discriminator", model.discriminator, size, classes, config.dtype, DISCRIMINATORS)

    def latents(key, count):
        of_z, of_label = jax.random.split(key)
        drawn = {"z": sample_latents(latent.kind, of_z, (count, latent.size))}
        return {**drawn, "label": jax.random.randint(of_label, (count,), 0, classes)} if classes else drawn

    def discriminate(params, state, x, label, train=True):
        return run(discriminator, params, state, x, label, train=train)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 3)
        x = to_input(views(batch["image"], keys[0])[:, 0], 0.5, 0.5)
        params, mutable = {}, {}
        params["generator"], mutable["generator"] = create(generator, keys[1], *generator_inputs(latents(keys[1], len(x))))
        params["discriminator"], mutable["discriminator"] = create(discriminator, keys[2], x, batch.get("label"))
        return params, {**mutable, "ema": jax.tree.map(jnp.copy, params["generator"])}

    def discriminator_loss(train, state, batch, key):
        of_views, of_latents = jax.random.split(key)
        real = to_input(views(batch["image"], of_views)[:, 0], 0.5, 0.5)
        drawn = latents(of_latents, len(real))
        fake, _ = run(generator, state.params["generator"], state.mutable["generator"], *generator_inputs(drawn), train=True)
        label = interleave(batch["label"], drawn["label"]) if classes else None
        (on_both, _), moved = discriminate(train["discriminator"], state.mutable["discriminator"], interleave(real, fake), label)
        on_real, on_fake = on_both.reshape(-1, 2).T
        logs = {**health(on_real, on_fake), "diversity": diversity(real, fake)}
        return GAME.discriminator(on_real, on_fake), ({"discriminator": moved}, logs)

    def generator_loss(train, state, batch, key):
        drawn = latents(key, len(batch["image"]) // model.discriminator_steps)
        fake, moved = run(generator, train["generator"], state.mutable["generator"], *generator_inputs(drawn), train=True)
        (on_fake, _), moved_d = discriminate(state.params["discriminator"], state.mutable["discriminator"], fake, drawn.get("label"))
        value, logs = GAME.generator(on_fake), {}
        if model.orthogonal:
            logs["orthogonality"] = sum(orthogonality(kernel) for kernel in kernels(train["generator"]))
            value += model.orthogonal * logs["orthogonality"]
        return value, ({"generator": moved, "discriminator": moved_d}, logs)

    def encode(params, mutable, images):
        label = jnp.zeros(images.shape[0], jnp.int32) if classes else None  # no feature depends on it
        x = to_input(images, 0.5, 0.5)
        return discriminate(params["discriminator"], mutable["discriminator"], x, label, train=False)[0][1]

    def logits_of(params, mutable, images, label=None):
        """Logits [B] of images with their labels [B]; without, the mean over all labels."""

        def logits(label):
            x = to_input(images, 0.5, 0.5)
            return discriminate(params["discriminator"], mutable["discriminator"], x, label, train=False)[0][0]

        if label is not None or not classes:
            return logits(label)
        every = jnp.broadcast_to(jnp.arange(classes)[:, None], (classes, len(images)))
        return jax.vmap(logits)(every).mean(0)

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape)), **({"label": Spec((), "int32")} if classes else {})},
        init=init,
        phases=(
            Phase("d", ("discriminator",), discriminator_loss, repeat=model.discriminator_steps),
            Phase("g", ("generator",), generator_loss),
        ),
        encode=encode,
        views=views,
        after=ema_of_generator(model.ema.decay, model.ema.start),
        fns=ModelFns(discriminate=logits_of),
        sampler=Sampler(*generator_sampler(generator, latents, latent.kind, config.eval_batch_size)),
        couples_batch=True,
    )


def interleave(a: jax.Array, b: jax.Array) -> jax.Array:
    """a, b [B, ...] -> [2B, ...], one of each in turn: each device keeps what it has. One behind the other they would move."""
    return jnp.stack([a, b], 1).reshape(2 * len(a), *a.shape[1:])


def kernels(params) -> list[jax.Array]:
    """The leaves named 'kernel': everything that multiplies, without embeddings, biases and gains."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]
