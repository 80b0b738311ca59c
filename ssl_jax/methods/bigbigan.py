"""BigBiGAN: BiGAN with BigGAN's networks, a stochastic encoder, and separate scores for images, latents and pairs.

Donahue and Simonyan 2019, "Large scale adversarial representation learning" (arXiv:1907.02544), section 2: n_d steps of the
discriminator, with a hinge on each score (the hinge of the sum is unstable), then one step of encoder and generator. Encoder and
generator minimize the same loss. The encoder's gradient comes through the scores of codes and pairs, the generator's through the
scores of images and pairs.

The encoder samples its code. A deterministic encoder is a point worse, and in public reimplementations it gave all generated images
the same code: `mean_variance` falls to zero in that collapse. `score_z_gap` shows how well the discriminator tells codes from
latents.
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
from ssl_jax.models.gan.sampler import ema_of_generator, generator_sampler, latent_sampler, to_unit
from ssl_jax.objectives import adversarial


def build(config, stages) -> Method:
    """`config.model`:

    size: of the images of generator and discriminator, in pixels. The encoder sees the views, which may be larger by an integer
      factor; the discriminator sees their block means.
    generator: network (see `build_network`). discriminator, encoder: see `models.gan.bigbigan`.
    latent: kind and size.
    discriminator_steps: n_d; each takes 1 / n_d of the batch, and so does the step of encoder and generator.
    ema: decay of the generator's moving average, which makes the samples, and the step at which averaging starts.
    mean, std: of the encoder's input; the other networks see [-1, 1].
    """
    model, latent = config.model, config.model.latent
    views = make_views(config.views)
    seen = jax.eval_shape(views, jax.ShapeDtypeStruct((1, *config.data.image_shape), jnp.uint8), jax.random.key(0)).shape[2]
    if seen % model.size:
        raise UserError(f"config.model.size={model.size} must divide the {seen} pixels of the views, which the encoder sees")
    generator = build_network("generator", model.generator, model.size, 0, config.dtype)
    encoder = build_bigbigan_encoder(model.encoder, latent.size, config.dtype)
    discriminator = build_discriminator(model.discriminator, model.size, config.dtype)

    sample_latents = latent_sampler(latent.kind, latent.size)

    def shrink(images):
        """[B, seen, seen, 3] in [0, 1] -> [B, size, size, 3] in [-1, 1]."""
        factor = seen // model.size
        x = images.reshape(len(images), model.size, factor, model.size, factor, 3).mean((2, 4))
        return to_input(x, 0.5, 0.5)

    def encode_distribution(params, state, images, train):
        return run(encoder, params, state, to_input(images, model.mean, model.std), train=train)

    def forward(params, state, images, key):
        """((scores of (x, E(x)), scores of (G(z), z)), new state of the three networks, (real, fake, encoder output, code))"""
        z_key, code_key = jax.random.split(key)
        real, z = shrink(images), sample_latents(z_key, len(images))["z"]
        new = {}
        fake, new["generator"] = run(generator, params["generator"], state["generator"], z, train=True)
        out, new["encoder"] = encode_distribution(params["encoder"], state["encoder"], images, train=True)
        code = out["mean"] + out["deviation"] * jax.random.normal(code_key, out["mean"].shape)
        encoded, after_real = run(discriminator, params["discriminator"], state["discriminator"], real, code, train=True)
        generated, new["discriminator"] = run(discriminator, params["discriminator"], after_real, fake, z, train=True)
        return (encoded, generated), new, (real, fake, out, code)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 5)
        x, z = views(batch["image"], keys[0])[:, 0], sample_latents(keys[1], len(batch["image"]))["z"]
        created = {
            "generator": create(generator, keys[2], z),
            "encoder": create(encoder, keys[3], to_input(x, model.mean, model.std)),
            "discriminator": create(discriminator, keys[4], shrink(x), z),
        }
        params = {name: p for name, (p, _) in created.items()}
        return params, {**{name: s for name, (_, s) in created.items()}, "ema": jax.tree.map(jnp.copy, params["generator"])}

    def discriminator_loss(train, state, batch, key):
        views_key, forward_key = jax.random.split(key)
        images = views(batch["image"], views_key)[:, 0]
        (encoded, generated), new, (real, fake, _, _) = forward({**state.params, **train}, state.mutable, images, forward_key)
        value, _ = adversarial.bigbigan(list(encoded.values()), list(generated.values()))
        logs = {**adversarial.health(encoded["xz"], generated["xz"]), "diversity": adversarial.diversity(real, fake)}
        logs["score_z_gap"] = encoded["z"].mean() - generated["z"].mean()
        # The phase that trains generator and encoder updates their statistics.
        return value, ({"discriminator": new["discriminator"]}, logs)

    def encoder_and_generator_loss(train, state, batch, key):
        views_key, forward_key = jax.random.split(key)
        images = views(split(batch, model.discriminator_steps)["image"][0], views_key)[:, 0]
        (encoded, generated), new, (_, _, out, code) = forward({**state.params, **train}, state.mutable, images, forward_key)
        _, value = adversarial.bigbigan(list(encoded.values()), list(generated.values()))
        return value, (new, code_metrics(out["mean"], out["deviation"], code))

    def encode(params, mutable, images):
        return encode_distribution(params["encoder"], mutable["encoder"], images, train=False)[0]

    def reconstruct(params, mutable, images):
        """Uses the raw generator, since the running statistics belong to its weights."""
        z = encode(params, mutable, images)["mean"]
        x, _ = run(generator, params["generator"], mutable["generator"], z, train=False)
        return to_unit(x)

    def discriminate_images(params, mutable, images):
        """Scores s_x [B] of images without codes."""
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
        fns=ModelFns(reconstruct=reconstruct, discriminate=discriminate_images),
        sampler=Sampler(*generator_sampler(generator, sample_latents, latent.kind, config.eval_batch_size)),
        encoder=("encoder",),
        encoder_stats=("encoder", "batch_stats"),
        couples_batch=True,
    )


def code_metrics(mean: jax.Array, deviation: jax.Array, code: jax.Array) -> dict[str, jax.Array]:
    """Statistics of codes, from mean, deviation and sampled code [B, Z] each.

    'mean_squared', 'mean_variance' (over the batch), 'deviation', and 'correlation', the mean |r| of two dimensions of the sampled
    codes. If codes match the latents, the expectation of mean^2 + deviation^2 is 1 and the correlation is near 0.
    """
    centered = code - code.mean(0)
    unit = centered / (jnp.linalg.norm(centered, axis=0) + 1e-12)
    size = code.shape[1]
    correlations = jnp.matmul(unit.T, unit, precision="highest")
    return {
        "mean_squared": jnp.mean(mean**2),
        "mean_variance": jnp.var(mean, 0).mean(),
        "deviation": jnp.mean(deviation),
        "correlation": jnp.sum(jnp.abs(correlations) * (1 - jnp.eye(size))) / max(1, size * (size - 1)),
    }
