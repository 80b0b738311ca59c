"""BiGAN: beside the generator an encoder is trained, and the discriminator judges pairs of an image and its code.

Donahue, Krahenbuhl and Darrell 2017, "Adversarial feature learning" (arXiv:1605.09782), section 3: with a discriminator that cannot
tell (x, E(x)) from (G(z), z) the encoder inverts the generator. As in the paper's code all three are updated at once, from one
forward pass: D on the labels, G and E on the swapped ones. D may all but win (its loss is 0.0003 in the published ImageNet run) while
the features get better: judge a run not by its losses but by `reconstruction_ratio`, which is 1 where codes tell nothing, and see that
`code_variance` stays near that of the latents.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, ModelFns, Phase, Sampler, Spec
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.bigan import build_nets
from ssl_jax.models.gan_sampler import draw_z, generator_sampler
from ssl_jax.objectives import adversarial


def build(config, stages) -> Method:
    """`config.model`:

    generator, encoder, discriminator: networks (see `models.gan.bigan.build_nets`); the generator's shape is [h, w, 3], or [h, w, 1] for
      grayscale. An encoder that gets larger views than that sees more than the discriminator, which gets them made smaller.
    latent: kind and size.
    mean, std: of what the networks see: 0.5 each for [-1, 1]. Images in this file are in [0, 1].
    """
    model, latent = config.model, config.model.latent
    *size, channels = model.generator.shape
    generator, encoder, discriminator = build_nets(model, config.dtype)
    views = make_views(config.views)

    latents = draw_z(latent.kind, latent.size)

    def pictures(images):
        x = to_input(images, 0.0, 1.0)
        return x.mean(-1, keepdims=True) if channels == 1 else x  # the data have three channels

    def shrink(x):
        shape = (len(x), *size, channels)
        return x if x.shape == shape else jnp.clip(jax.image.resize(x, shape, "cubic"), 0, 1)

    def to_net(x):
        return to_input(x, model.mean[:channels], model.std[:channels])

    def code(params, state, x, train):
        return run(encoder, params, state, to_net(x), train=train)

    def discriminate(params, state, x, z, train):
        return run(discriminator, params, state, to_net(x), z, train=train)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 5)
        x, z = pictures(views(batch["image"], keys[0])[:, 0]), latents(keys[1], len(batch["image"]))["z"]
        made = {
            "generator": create(generator, keys[2], z),
            "encoder": create(encoder, keys[3], to_net(x)),
            "discriminator": create(discriminator, keys[4], to_net(shrink(x)), z),
        }
        return {k: params for k, (params, _) in made.items()}, {k: state for k, (_, state) in made.items()}

    def game(train, state, batch, key):
        of_views, of_latents = jax.random.split(key)
        x = pictures(views(batch["image"], of_views)[:, 0])
        z = latents(of_latents, len(x))["z"]
        moved = dict(state.mutable)
        fake, moved["generator"] = run(generator, train["generator"], moved["generator"], z, train=True)
        codes, moved["encoder"] = code(train["encoder"], moved["encoder"], x, train=True)
        real, z_real = shrink(x), codes["latent"]
        on_real, moved["discriminator"] = discriminate(train["discriminator"], moved["discriminator"], real, z_real, train=True)
        on_fake, moved["discriminator"] = discriminate(train["discriminator"], moved["discriminator"], fake, z, train=True)

        logs = adversarial.health(on_real, on_fake)
        logs["diversity"] = adversarial.diversity(real, fake)
        logs["code_variance"] = jnp.var(z_real, 0).mean()
        again, _ = run(generator, *jax.lax.stop_gradient((train["generator"], moved["generator"], z_real)), train=False)
        logs["reconstruction"], logs["reconstruction_shuffled"] = distance(real, again), distance(jnp.roll(real, 1, 0), again)
        logs["reconstruction_ratio"] = logs["reconstruction"] / logs["reconstruction_shuffled"]
        return adversarial.bigan(on_real, on_fake), (moved, logs)

    def encode(params, mutable, images):
        return code(params["encoder"], mutable["encoder"], pictures(images), train=False)[0]

    def reconstruct(params, mutable, images):
        z = encode(params, mutable, images)["latent"]
        return to_color(run(generator, params["generator"], mutable["generator"], z, train=False)[0])

    def logits_of(params, mutable, images):
        z = encode(params, mutable, images)["latent"]
        return discriminate(params["discriminator"], mutable["discriminator"], shrink(pictures(images)), z, train=False)[0]

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("game", (("discriminator",), ("generator", "encoder")), game),),
        encode=encode,
        views=views,
        fns=ModelFns(reconstruct=reconstruct, discriminate=logits_of),
        sampler=Sampler(*generator_sampler(generator, latents, latent.kind, config.eval_batch_size, ema=False, to_image=to_color)),
        encoder=("encoder",),
        encoder_stats=("encoder", "batch_stats"),
        couples_batch=True,
    )


def to_color(x: jax.Array) -> jax.Array:
    """[B, H, W, 1 or 3] -> [B, H, W, 3]."""
    return jnp.broadcast_to(x, (*x.shape[:-1], 3))


def distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over the batch of |x - y|_2 over all pixels and channels: the paper's EGr."""
    return jnp.linalg.norm((x - y).reshape(len(x), -1), axis=-1).mean()
