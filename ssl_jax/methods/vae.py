"""Variational autoencoder: an encoder to a distribution of codes, a decoder to a distribution of images, one bound that trains both.

Kingma and Welling 2014, "Auto-encoding variational Bayes" (arXiv:1312.6114): log p(x) >= E log p(x | z) - KL(q(z | x) || p(z)), with z
drawn from q such that gradients flow through it. Burda et al. 2016, "Importance weighted autoencoders" (arXiv:1509.00519): a tighter
bound from k draws, with which any such model is measured too. Higgins et al. 2017 (beta-VAE): the KL times beta, for codes whose
dimensions mean something. Losses and bounds are in nats per image. See that `active_units` does not fall to zero: a decoder that needs
no code gets a KL of nothing.
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

ACTIVE = 1e-2  # variance over images of a posterior mean, above which a latent counts as used (Burda et al. 2016, section 5.1)
TRAVERSED = 10


def build(config, stages) -> Method:
    """`config.model`:

    encoder, decoder: networks (see `models.autoencoders`).
    channels: 1 models grayscale data (the mean of the three channels), 3 colors.
    latent_size: Z.
    likelihood: key of `LIKELIHOODS`.
    bound: 'elbo' or 'iwae', of `samples` draws: the mean of k ELBOs, or the importance bound of k.
    beta, free_bits, warmup: weight of the KL, nats a latent that are free, steps in which the weight rises from 0; ELBO only.
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
    # None of these networks has a state, or does in training anything else: train=False throughout.

    def posterior(net, x):
        """[B, H, W, C] in [0, 1] -> (layers, mean [B, Z], log-variance [B, Z]) of q(z | x)."""
        layers, _ = run(encoder, net["encoder"], {}, x, train=False)
        return layers, *jnp.split(layers.pop("out"), 2, -1)

    def decode(net, z):
        return run(decoder, net["decoder"], {}, z, train=False)[0]

    def images_of(net, z):
        return to_color(likelihood.mean(decode(net, z)))

    def draw(net, x, mean, log_variance, key, k):
        """k draws from q(z | x): (log p(x | z) [k, B], log p(x, z) / q(z | x) [k, B])."""
        x, mean, log_variance = (jnp.repeat(values, k, 0) for values in (x, mean, log_variance))  # the draws of an image side by side
        z = objectives.sample_gaussian(key, mean, log_variance)
        log_likelihood = per_image(likelihood.log_prob(x, decode(net, z)))
        log_prior = objectives.gaussian(z, 0.0, jnp.zeros(())).sum(-1)
        log_posterior = objectives.gaussian(z, mean, 0.5 * log_variance).sum(-1)
        return log_likelihood.reshape(-1, k).T, (log_likelihood + log_prior - log_posterior).reshape(-1, k).T

    def init(key, batch, frozen):
        keys = jax.random.split(key, 3)
        x = to_channels(views(batch["image"], keys[0])[:, 0], model.channels)
        net = {"encoder": create(encoder, keys[1], x)[0]}
        net["decoder"] = create(decoder, keys[2], posterior(net, x)[1])[0]
        return {"net": net}, {}

    def loss(train, state, batch, key):
        of_views, of_data, of_draws = jax.random.split(key, 3)
        x = to_channels(views(batch["image"], of_views)[:, 0], model.channels)
        x = likelihood.data(of_data, x)
        _, mean, log_variance = posterior(train["net"], x)
        log_likelihood, log_weights = draw(train["net"], x, mean, log_variance, of_draws, model.samples)
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
        return -bound, ({}, logs)

    def encode(params, mutable, images):
        layers, mean, _ = posterior(params["net"], to_channels(images, model.channels))
        return {**layers, "code": mean, "pooled": mean}

    def reconstruct(params, mutable, images):
        return images_of(params["net"], encode(params, mutable, images)["code"])

    def log_prob(params, mutable, images, key, count):
        """The mean of `count` single draws, and the importance bound of the same draws, one after another: they may be thousands."""
        net, (of_data, of_draws) = params["net"], jax.random.split(key)
        x = likelihood.data(of_data, to_channels(images, model.channels))
        _, mean, log_variance = posterior(net, x)

        def step(carry, key):
            total, log_total = carry
            log_weight = draw(net, x, mean, log_variance, key, 1)[1][0]
            return (total + log_weight, jnp.logaddexp(log_total, log_weight)), None

        start = jnp.zeros(len(x)), jnp.full(len(x), -jnp.inf)
        (total, log_total), _ = jax.lax.scan(step, start, jax.random.split(of_draws, count))
        return {"elbo": total / count, "iwae": log_total - jnp.log(count), "dimensions": jnp.float32(x[0].size)}

    def traverse(params, mutable, images, values):
        """One latent at a time takes each of `values`, the others stay: [N], [V] -> [N, Z', V, h, w, 3], Z' at most 10."""
        code = encode(params, mutable, images)["code"]
        chosen = jnp.eye(model.latent_size, dtype=bool)[:TRAVERSED, None]  # [Z', 1, Z]
        z = jnp.where(chosen, values[:, None], code[:, None, None])  # [N, Z', V, Z]
        return images_of(params["net"], z.reshape(-1, model.latent_size)).reshape(*z.shape[:3], *shape[:2], 3)

    def latents(key, count):
        return {"z": jax.random.normal(key, (count, model.latent_size))}

    def prepare(params, mutable, key, truncation=None):
        return params["net"]

    def sample(net, drawn, truncation=None):
        """The means of p(x | z): no pixel's own noise."""
        return images_of(net, truncate_latents("normal", drawn["z"], truncation))

    bounded = model.likelihood != "cross_entropy"  # which is no likelihood of gray values
    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("vae", ("net",), loss),),
        encode=encode,
        views=views,
        fns=ModelFns(reconstruct=reconstruct, traverse=traverse, log_prob=log_prob if bounded else None),
        sampler=Sampler(latents, prepare, sample),
        encoder=("net", "encoder"),
        couples_batch=model.free_bits > 0,
        notes={"likelihood": likelihood.note},
    )


def per_image(x: jax.Array) -> jax.Array:
    """Sums over everything but the batch."""
    return x.sum(tuple(range(1, x.ndim)))
