"""Variational autoencoder: an encoder to a distribution of codes and a decoder to a distribution of images, trained by one bound.

Kingma and Welling 2014, "Auto-encoding variational Bayes" (arXiv:1312.6114): log p(x) >= E log p(x | z) - KL(q(z | x) || p(z)),
with reparameterized samples z from q. Burda et al. 2016, "Importance weighted autoencoders" (arXiv:1509.00519): a tighter bound
from k samples, which `log_prob` reports for every model. Higgins et al. 2017 (beta-VAE): the KL times beta, for disentangled codes.
Losses and bounds are in nats per image.

Watch `active_units`: it falls to zero in posterior collapse, when the decoder ignores the code and the KL vanishes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import Method, ModelFns, Phase, Sampler, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.autoencoders import build_decoder, build_encoder, to_channels, to_color
from ssl_jax.models.common import create, run
from ssl_jax.objectives import likelihood as objectives
from ssl_jax.sampling.latents import truncate_latents

ACTIVE = 1e-2  # a latent is active if the variance of its posterior mean over images is larger (Burda et al. 2016, section 5.1)
TRAVERSED = 10  # at most so many latents are traversed


def build(config, stages) -> Method:
    """`config.model`:

    encoder, decoder: networks (see `models.autoencoders`).
    channels: 1 models grayscale data (the mean of the three channels), 3 colors.
    latent_size: Z.
    likelihood: key of `LIKELIHOODS`.
    bound: 'elbo' or 'iwae', of k = `samples` samples: the mean of k ELBOs, or the importance-weighted bound.
    beta, free_bits, warmup: weight of the KL, free nats per latent, steps in which the weight rises from 0; ELBO only.
    """
    model = config.model
    if model.likelihood not in objectives.LIKELIHOODS:
        raise UserError(f"config.model.likelihood={model.likelihood!r} is unknown; choose {', '.join(objectives.LIKELIHOODS)}")
    if model.bound not in ("elbo", "iwae"):
        raise UserError(f"config.model.bound={model.bound!r} is unknown; choose elbo or iwae")
    if model.bound == "iwae" and (model.beta, model.free_bits, model.warmup) != (1.0, 0.0, 0):
        raise UserError("config.model.bound='iwae' has no KL to weigh; set beta=1.0, free_bits=0.0 and warmup=0, or bound='elbo'")
    likelihood = objectives.LIKELIHOODS[model.likelihood]
    views = make_views(config.views)
    shape = (*output_size(config.views, config.data.image_shape[-3:-1]), model.channels)
    encoder = build_encoder(model.encoder, 2 * model.latent_size, config.dtype)
    decoder = build_decoder(model.decoder, (*shape[:2], likelihood.outputs * model.channels), config.dtype)

    def posterior(net, state, x, train=False):
        """[B, H, W, C] in [0, 1] -> (layers, mean [B, Z], log-variance [B, Z]) of q(z | x), and the state of the encoder.

        Only a backbone has state.
        """
        layers, state = run(encoder, net["encoder"], state, x, train=train)
        return layers, *jnp.split(layers.pop("out"), 2, -1), state

    def decode(net, z):
        return run(decoder, net["decoder"], {}, z, train=False)[0]

    def decode_to_images(net, z):
        return to_color(likelihood.mean(decode(net, z)))

    def sample_posterior(net, x, mean, log_variance, key, k):
        """For k samples from q(z | x): (log p(x | z) [k, B], log p(x, z) / q(z | x) [k, B])."""
        x, mean, log_variance = (jnp.repeat(values, k, 0) for values in (x, mean, log_variance))  # samples of an image are adjacent
        z = objectives.sample_gaussian(key, mean, log_variance)
        log_likelihood = per_image(likelihood.log_prob(x, decode(net, z)))
        log_prior = objectives.gaussian(z, 0.0, jnp.zeros(())).sum(-1)
        log_posterior = objectives.gaussian(z, mean, 0.5 * log_variance).sum(-1)
        return log_likelihood.reshape(-1, k).T, (log_likelihood + log_prior - log_posterior).reshape(-1, k).T

    def init(key, batch, frozen):
        keys = jax.random.split(key, 3)
        x = to_channels(views(batch["image"], keys[0])[:, 0], model.channels)
        params, state = create(encoder, keys[1], x)
        net = {"encoder": params}
        net["decoder"] = create(decoder, keys[2], posterior(net, state, x)[1])[0]
        return {"net": net}, state

    def loss(train, state, batch, key):
        views_key, data_key, sample_key = jax.random.split(key, 3)
        x = to_channels(views(batch["image"], views_key)[:, 0], model.channels)
        x = likelihood.data(data_key, x)
        _, mean, log_variance, after = posterior(train["net"], state.mutable, x, train=True)
        log_likelihood, log_weights = sample_posterior(train["net"], x, mean, log_variance, sample_key, model.samples)
        kl = objectives.kl_gaussian(mean, log_variance)
        if model.bound == "iwae":
            bound = objectives.importance_bound(log_weights).mean()
        else:
            beta = model.beta * jnp.minimum(1.0, (state.step + 1) / max(1, model.warmup))
            bound = objectives.elbo(log_likelihood.mean(0), kl, beta, model.free_bits)
        logs = {
            "elbo": objectives.elbo(log_likelihood.mean(0), kl), "log_likelihood": log_likelihood.mean(), "kl": kl.sum(-1).mean(),
            "active_units": (jnp.var(mean, 0) > ACTIVE).sum(),
        }  # fmt: skip
        return -bound, (after, logs)

    def encode(params, mutable, images):
        layers, mean, _, _ = posterior(params["net"], mutable, to_channels(images, model.channels))
        return {"pooled": mean, **layers, "code": mean}  # a backbone has pooled features of its own

    def reconstruct(params, mutable, images):
        return decode_to_images(params["net"], encode(params, mutable, images)["code"])

    def log_prob(params, mutable, images, key, count):
        """ELBO and importance-weighted bound of the same `count` samples, one at a time, since thousands do not fit in memory."""
        net, (data_key, sample_key) = params["net"], jax.random.split(key)
        x = likelihood.data(data_key, to_channels(images, model.channels))
        _, mean, log_variance, _ = posterior(net, mutable, x)

        def step(carry, key):
            total, log_total = carry
            log_weight = sample_posterior(net, x, mean, log_variance, key, 1)[1][0]
            return (total + log_weight, jnp.logaddexp(log_total, log_weight)), None

        start = jnp.zeros(len(x)), jnp.full(len(x), -jnp.inf)
        (total, log_total), _ = jax.lax.scan(step, start, jax.random.split(sample_key, count))
        return {"elbo": total / count, "iwae": log_total - jnp.log(count), "dimensions": jnp.float32(x[0].size)}

    def traverse(params, mutable, images, values):
        """Set one latent at a time to each of `values`: images [N, ...], [V] -> [N, Z', V, h, w, 3] with Z' = min(Z, 10)."""
        code = encode(params, mutable, images)["code"]
        chosen = jnp.eye(model.latent_size, dtype=bool)[:TRAVERSED, None]  # [Z', 1, Z]
        z = jnp.where(chosen, values[:, None], code[:, None, None])  # [N, Z', V, Z]
        return decode_to_images(params["net"], z.reshape(-1, model.latent_size)).reshape(*z.shape[:3], *shape[:2], 3)

    def sample_latents(key, count):
        return {"z": jax.random.normal(key, (count, model.latent_size))}

    def prepare(params, mutable, key, truncation=None):
        return params["net"]

    def sample(net, latents, truncation=None):
        """Means of p(x | z), without pixel noise."""
        return decode_to_images(net, truncate_latents("normal", latents["z"], truncation))

    bounded = model.likelihood != "cross_entropy"  # cross-entropy is no likelihood of gray values
    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("vae", ("net",), loss),),
        encode=encode,
        views=views,
        fns=ModelFns(reconstruct=reconstruct, traverse=traverse, log_prob=log_prob if bounded else None),
        sampler=Sampler(sample_latents, prepare, sample),
        encoder=("net", "encoder"),
        encoder_stats=("batch_stats",),
        couples_batch=model.free_bits > 0,
        notes={"likelihood": likelihood.note},
    )


def per_image(x: jax.Array) -> jax.Array:
    """Sums over everything but the batch."""
    return x.sum(tuple(range(1, x.ndim)))
