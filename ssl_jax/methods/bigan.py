"""BiGAN: an encoder is trained with the generator, and the discriminator sees pairs of an image and its code.

Donahue, Krahenbuhl and Darrell 2017, "Adversarial feature learning" (arXiv:1605.09782), section 3: if the discriminator cannot
tell (x, E(x)) from (G(z), z), the encoder inverts the generator. As in the paper's code, one forward pass updates all three
networks: D learns the labels, G and E learn the swapped labels.

D may nearly win (its loss is 0.0003 in the published ImageNet run) while the features still improve. So watch
`reconstruction_ratio`, which is 1 if codes carry no information, and `code_variance`, which should stay near the variance of the
latents.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, ModelFns, Phase, Sampler, Spec
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.bigan import build_nets
from ssl_jax.models.gan.sampler import generator_sampler, latent_sampler
from ssl_jax.objectives import adversarial


def build(config, stages) -> Method:
    """`config.model`:

    generator, encoder, discriminator: networks (see `models.gan.bigan.build_nets`). The generator's shape is [h, w, 3],
      or [h, w, 1] for grayscale. Views may be larger than that: the encoder sees them whole, the discriminator sees them resized.
    latent: kind and size.
    mean, std: of the networks' input: 0.5 each for [-1, 1]. Images in this file are in [0, 1].
    """
    model, latent = config.model, config.model.latent
    *size, channels = model.generator.shape
    generator, encoder, discriminator = build_nets(model, config.dtype)
    views = make_views(config.views)

    sample_latents = latent_sampler(latent.kind, latent.size)

    def to_channels(images):
        x = to_input(images, 0.0, 1.0)
        return x.mean(-1, keepdims=True) if channels == 1 else x  # the data have three channels

    def shrink(x):
        shape = (len(x), *size, channels)
        return x if x.shape == shape else jnp.clip(jax.image.resize(x, shape, "cubic"), 0, 1)

    def to_net(x):
        return to_input(x, model.mean[:channels], model.std[:channels])

    def encode_input(params, state, x, train):
        return run(encoder, params, state, to_net(x), train=train)

    def discriminate(params, state, x, z, train):
        return run(discriminator, params, state, to_net(x), z, train=train)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 5)
        x, z = to_channels(views(batch["image"], keys[0])[:, 0]), sample_latents(keys[1], len(batch["image"]))["z"]
        created = {
            "generator": create(generator, keys[2], z),
            "encoder": create(encoder, keys[3], to_net(x)),
            "discriminator": create(discriminator, keys[4], to_net(shrink(x)), z),
        }
        return {k: params for k, (params, _) in created.items()}, {k: state for k, (_, state) in created.items()}

    def loss(train, state, batch, key):
        views_key, latents_key = jax.random.split(key)
        x = to_channels(views(batch["image"], views_key)[:, 0])
        z = sample_latents(latents_key, len(x))["z"]
        new = dict(state.mutable)
        fake, new["generator"] = run(generator, train["generator"], new["generator"], z, train=True)
        codes, new["encoder"] = encode_input(train["encoder"], new["encoder"], x, train=True)
        real, z_real = shrink(x), codes["latent"]
        on_real, new["discriminator"] = discriminate(train["discriminator"], new["discriminator"], real, z_real, train=True)
        on_fake, new["discriminator"] = discriminate(train["discriminator"], new["discriminator"], fake, z, train=True)

        logs = adversarial.health(on_real, on_fake)
        logs["diversity"] = adversarial.diversity(real, fake)
        logs["code_variance"] = jnp.var(z_real, 0).mean()
        reconstruction, _ = run(generator, *jax.lax.stop_gradient((train["generator"], new["generator"], z_real)), train=False)
        logs["reconstruction"] = distance(real, reconstruction)
        logs["reconstruction_shuffled"] = distance(jnp.roll(real, 1, 0), reconstruction)
        logs["reconstruction_ratio"] = logs["reconstruction"] / logs["reconstruction_shuffled"]
        return adversarial.bigan(on_real, on_fake), (new, logs)

    def encode(params, mutable, images):
        return encode_input(params["encoder"], mutable["encoder"], to_channels(images), train=False)[0]

    def reconstruct(params, mutable, images):
        z = encode(params, mutable, images)["latent"]
        return to_color(run(generator, params["generator"], mutable["generator"], z, train=False)[0])

    def discriminate_images(params, mutable, images):
        z = encode(params, mutable, images)["latent"]
        return discriminate(params["discriminator"], mutable["discriminator"], shrink(to_channels(images)), z, train=False)[0]

    sampler = generator_sampler(generator, sample_latents, latent.kind, config.eval_batch_size, ema=False, to_image=to_color)
    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("game", (("discriminator",), ("generator", "encoder")), loss),),
        encode=encode,
        views=views,
        fns=ModelFns(reconstruct=reconstruct, discriminate=discriminate_images),
        sampler=Sampler(*sampler),
        encoder=("encoder",),
        encoder_stats=("encoder", "batch_stats"),
        couples_batch=True,
    )


def to_color(x: jax.Array) -> jax.Array:
    """[B, H, W, 1 or 3] -> [B, H, W, 3]."""
    return jnp.broadcast_to(x, (*x.shape[:-1], 3))


def distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over the batch of the L2 norm of x - y over pixels and channels: e(x, G(E(x))) in the paper."""
    return jnp.linalg.norm((x - y).reshape(len(x), -1), axis=-1).mean()
