"""BigGAN: large batches, large networks, class labels for generator and discriminator, and samples from truncated latents.

Brock et al. 2019, "Large scale GAN training for high fidelity natural image synthesis" (arXiv:1809.11096). The label of an image
modulates the generator's normalizations, and the discriminator projects on it (Miyato and Koyama 2018, arXiv:1802.05637). Labels of
fakes are uniform. Samples come from a moving average of the generator's weights, with batch statistics recomputed for them
("standing statistics"). `encode` returns the features of the discriminator.
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
from ssl_jax.models.gan.sampler import ema_of_generator, generator_inputs, generator_sampler
from ssl_jax.objectives.adversarial import GAN_LOSSES, diversity, health, orthogonality
from ssl_jax.sampling.latents import sample_latents

HINGE = GAN_LOSSES["hinge"]
# One pass sees real and generated images together, so networks with batch statistics are excluded.
DISCRIMINATORS = {"discriminator": {name: NETWORKS["discriminator"][name] for name in ("sngan", "biggan", "biggan_deep")}}


def build(config, stages) -> Method:
    """`config.model`:

    generator, discriminator: networks (see `build_network`).
    latent: kind ('normal' or 'uniform') and size.
    conditional: both networks are given class labels.
    discriminator_steps: n_d; each takes 1 / n_d of the batch, and the generator's step makes as many images.
    orthogonal: weight of the generator's orthogonal regularization; 0 for none.
    ema: decay of the generator's moving average, which makes the samples, and the step at which averaging starts.
    """
    model, latent = config.model, config.model.latent
    classes = config.data.num_classes if model.conditional else 0
    if model.conditional and not classes:
        raise UserError(
            f"config.model.conditional needs labels that are classes, and {config.data.name!r} has none; give "
            "--config.model.conditional=False"
        )
    views = make_views(config.views)
    size = jax.eval_shape(views, jax.ShapeDtypeStruct((1, *config.data.image_shape), jnp.uint8), jax.random.key(0)).shape[2]
    generator = build_network("generator", model.generator, size, classes, config.dtype)
    discriminator = build_network("discriminator", model.discriminator, size, classes, config.dtype, DISCRIMINATORS)

    def latents_and_labels(key, count):
        z_key, label_key = jax.random.split(key)
        latents = {"z": sample_latents(latent.kind, z_key, (count, latent.size))}
        return {**latents, "label": jax.random.randint(label_key, (count,), 0, classes)} if classes else latents

    def discriminate(params, state, x, label, train=True):
        return run(discriminator, params, state, x, label, train=train)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 3)
        x = to_input(views(batch["image"], keys[0])[:, 0], 0.5, 0.5)
        params, mutable = {}, {}
        latents = latents_and_labels(keys[1], len(x))
        params["generator"], mutable["generator"] = create(generator, keys[1], *generator_inputs(latents))
        params["discriminator"], mutable["discriminator"] = create(discriminator, keys[2], x, batch.get("label"))
        return params, {**mutable, "ema": jax.tree.map(jnp.copy, params["generator"])}

    def discriminator_loss(train, state, batch, key):
        views_key, latents_key = jax.random.split(key)
        real = to_input(views(batch["image"], views_key)[:, 0], 0.5, 0.5)
        latents = latents_and_labels(latents_key, len(real))
        fake, _ = run(generator, state.params["generator"], state.mutable["generator"], *generator_inputs(latents), train=True)
        label = interleave(batch["label"], latents["label"]) if classes else None
        both = interleave(real, fake)
        (on_both, _), new_state = discriminate(train["discriminator"], state.mutable["discriminator"], both, label)
        on_real, on_fake = on_both.reshape(-1, 2).T
        logs = {**health(on_real, on_fake), "diversity": diversity(real, fake)}
        return HINGE.discriminator(on_real, on_fake), ({"discriminator": new_state}, logs)

    def generator_loss(train, state, batch, key):
        latents = latents_and_labels(key, len(batch["image"]) // model.discriminator_steps)
        fake, new_g = run(generator, train["generator"], state.mutable["generator"], *generator_inputs(latents), train=True)
        label = latents.get("label")
        (on_fake, _), new_d = discriminate(state.params["discriminator"], state.mutable["discriminator"], fake, label)
        value, logs = HINGE.generator(on_fake), {}
        if model.orthogonal:
            logs["orthogonality"] = sum(orthogonality(kernel) for kernel in kernels(train["generator"]))
            value += model.orthogonal * logs["orthogonality"]
        return value, ({"generator": new_g, "discriminator": new_d}, logs)

    def encode(params, mutable, images):
        label = jnp.zeros(images.shape[0], jnp.int32) if classes else None  # no feature depends on it
        x = to_input(images, 0.5, 0.5)
        return discriminate(params["discriminator"], mutable["discriminator"], x, label, train=False)[0][1]

    def discriminate_images(params, mutable, images, label=None):
        """Logits [B] of images with labels [B]; without labels, the mean over all classes."""

        def logits(label):
            x = to_input(images, 0.5, 0.5)
            return discriminate(params["discriminator"], mutable["discriminator"], x, label, train=False)[0][0]

        if label is not None or not classes:
            return logits(label)
        all_labels = jnp.broadcast_to(jnp.arange(classes)[:, None], (classes, len(images)))
        return jax.vmap(logits)(all_labels).mean(0)

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
        fns=ModelFns(discriminate=discriminate_images),
        sampler=Sampler(*generator_sampler(generator, latents_and_labels, latent.kind, config.eval_batch_size)),
        couples_batch=True,
    )


def interleave(a: jax.Array, b: jax.Array) -> jax.Array:
    """a, b [B, ...] -> [2B, ...] in the order a0, b0, a1, b1, ...: unlike concatenation, this moves no rows between devices."""
    return jnp.stack([a, b], 1).reshape(2 * len(a), *a.shape[1:])


def kernels(params) -> list[jax.Array]:
    """The leaves named 'kernel': weights of linear and convolution layers, without embeddings, biases and gains."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]
