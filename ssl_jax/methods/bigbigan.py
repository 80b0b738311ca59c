"""BigBiGAN: BiGAN with BigGAN's networks, a stochastic encoder, and scores for images and latents alone beside that of pairs.

Donahue and Simonyan 2019, "Large scale adversarial representation learning" (arXiv:1907.02544), section 2: n_d steps of the
discriminator, each score hinged by itself (the hinge of their sum is unstable), then one of encoder and generator. These two
minimize the same loss, and yet the encoder's gradient comes through the scores of its codes and pairs only, the generator's through
those of its images and pairs. The encoder draws its code; a deterministic one is not only worse by a point, but in public
reimplementations gave one and the same code to all generated images. `mean_variance` going to zero is that collapse; `score_z_gap`
tells how well the discriminator knows codes from latents.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, ModelFns, Phase, Sampler, Spec
from ssl_jax.engine.step import split
from ssl_jax.errors import UserError
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.bigbigan import build_bigbigan_encoder, build_discriminator
from ssl_jax.models.gan.networks import build_network
from ssl_jax.models.gan_sampler import draw_z, ema_of_generator, generator_sampler, to_unit
from ssl_jax.objectives import adversarial


def build(config, stages) -> Method:
    """`config.model`:

    size: of the images that the generator makes and the discriminator sees. The encoder sees the views, which may be larger by a
      whole factor; the discriminator gets the means of their blocks.
    generator: network (see `build_player`). discriminator, encoder: see `models.gan.bigbigan`.
    latent: kind and size.
    discriminator_steps: n_d; each takes 1 / n_d of the batch, and so does the step of encoder and generator.
    ema: decay of the averaged generator, which makes the samples, and the step from which it is averaged.
    mean, std: of what the encoder sees; the others see [-1, 1].
    """
    model, latent = config.model, config.model.latent
    views = make_views(config.views)
    seen = jax.eval_shape(views, jax.ShapeDtypeStruct((1, *config.data.image_shape), jnp.uint8), jax.random.key(0)).shape[2]
    if seen % model.size:
        raise UserError(f"config.model.size={model.size} must divide the {seen} pixels of the views, which the encoder sees")
    generator = build_network("generator", model.generator, model.size, 0, config.dtype)
    encoder = build_bigbigan_encoder(model.encoder, latent.size, config.dtype)
    discriminator = build_discriminator(model.discriminator, model.size, config.dtype)

    latents = draw_z(latent.kind, latent.size)

    def shrink(images):
        """[B, seen, seen, 3] in [0, 1] -> [B, size, size, 3] in [-1, 1]."""
        factor = seen // model.size
        x = images.reshape(len(images), model.size, factor, model.size, factor, 3).mean((2, 4))
        return to_input(x, 0.5, 0.5)

    def encode_distribution(params, state, images, train):
        return run(encoder, params, state, to_input(images, model.mean, model.std), train=train)

    def play(params, state, images, key):
        """Both pairs' scores with `params` of all three players, the new state of each, and what the phases report of."""
        of_z, of_code = jax.random.split(key)
        real, z = shrink(images), latents(of_z, len(images))["z"]
        moved = {}
        fake, moved["generator"] = run(generator, params["generator"], state["generator"], z, train=True)
        out, moved["encoder"] = encode_distribution(params["encoder"], state["encoder"], images, train=True)
        code = out["mean"] + out["deviation"] * jax.random.normal(of_code, out["mean"].shape)
        encoded, after_real = run(discriminator, params["discriminator"], state["discriminator"], real, code, train=True)
        generated, moved["discriminator"] = run(discriminator, params["discriminator"], after_real, fake, z, train=True)
        return (encoded, generated), moved, (real, fake, out, code)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 5)
        x, z = views(batch["image"], keys[0])[:, 0], latents(keys[1], len(batch["image"]))["z"]
        made = {
            "generator": create(generator, keys[2], z),
            "encoder": create(encoder, keys[3], to_input(x, model.mean, model.std)),
            "discriminator": create(discriminator, keys[4], shrink(x), z),
        }
        params = {name: p for name, (p, _) in made.items()}
        return params, {**{name: s for name, (_, s) in made.items()}, "ema": jax.tree.map(jnp.copy, params["generator"])}

    def discriminator_loss(train, state, batch, key):
        of_views, of_play = jax.random.split(key)
        images = views(batch["image"], of_views)[:, 0]
        (encoded, generated), moved, (real, fake, _, _) = play({**state.params, **train}, state.mutable, images, of_play)
        value, _ = adversarial.bigbigan(list(encoded.values()), list(generated.values()))
        logs = {**adversarial.health(encoded["xz"], generated["xz"]), "diversity": adversarial.diversity(real, fake)}
        logs["score_z_gap"] = encoded["z"].mean() - generated["z"].mean()
        # Statistics of generator and encoder are those of the phase that moves them.
        return value, ({"discriminator": moved["discriminator"]}, logs)

    def encoder_and_generator_loss(train, state, batch, key):
        of_views, of_play = jax.random.split(key)
        images = views(split(batch, model.discriminator_steps)["image"][0], of_views)[:, 0]
        (encoded, generated), moved, (_, _, out, code) = play({**state.params, **train}, state.mutable, images, of_play)
        _, value = adversarial.bigbigan(list(encoded.values()), list(generated.values()))
        return value, (moved, code_metrics(out["mean"], out["deviation"], code))

    def encode(params, mutable, images):
        return encode_distribution(params["encoder"], mutable["encoder"], images, train=False)[0]

    def reconstruct(params, mutable, images):
        """With the raw generator: running statistics are those of its weights."""
        z = encode(params, mutable, images)["mean"]
        x, _ = run(generator, params["generator"], mutable["generator"], z, train=False)
        return to_unit(x)

    def scores_of_images(params, mutable, images):
        """Of images alone, without codes."""
        z = encode(params, mutable, images)["mean"]
        x = shrink(to_input(images, 0.0, 1.0))
        return run(discriminator, params["discriminator"], mutable["discriminator"], x, z, train=False)[0]["x"]

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(
            Phase("d", ("discriminator",), discriminator_loss, repeat=model.discriminator_steps),
            Phase("ge", ("generator", "encoder"), encoder_and_generator_loss),
        ),
        encode=encode,
        views=views,
        after=ema_of_generator(model.ema.decay, model.ema.start),
        fns=ModelFns(reconstruct=reconstruct, discriminate=scores_of_images),
        sampler=Sampler(*generator_sampler(generator, latents, latent.kind, config.eval_batch_size)),
        encoder=("encoder",),
        encoder_stats=("encoder", "batch_stats"),
        couples_batch=True,
    )


def code_metrics(mean: jax.Array, deviation: jax.Array, code: jax.Array) -> dict[str, jax.Array]:
    """Of codes [B, Z], for which 1, 0, 1 and 0 would be the latents': squared norm of the means over Z (with `deviation` squared it
    makes 1), variance of the means over the batch, deviation, and correlation (mean |r| of two dimensions of the drawn codes)."""
    centered = code - code.mean(0)
    unit = centered / (jnp.linalg.norm(centered, axis=0) + 1e-12)
    size = code.shape[1]
    return {
        "mean_squared": jnp.mean(mean**2),
        "mean_variance": jnp.var(mean, 0).mean(),
        "deviation": jnp.mean(deviation),
        "correlation": jnp.sum(jnp.abs(unit.T @ unit) * (1 - jnp.eye(size))) / max(1, size * (size - 1)),
    }
