"""StyleGAN 1 and 2: a mapped latent controls each layer of the generator, and regularizers run every few steps.

Karras et al. 2019, "A style-based generator architecture for generative adversarial networks" (arXiv:1812.04948); Karras et al.
2020a, "Analyzing and improving the image quality of StyleGAN" (arXiv:1912.04958): path length regularization, lazy regularizers,
networks without progressive growing; Karras et al. 2020b, "Training generative adversarial networks with limited data"
(arXiv:2006.06676): augmentation of the discriminator's input, with a probability that adapts to overfitting. `encode` returns the
features of the discriminator.

A step updates, in the published order: generator, path length regularizer, discriminator, R1 penalty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssl_jax.augment.diffaugment import adapt, augment, check_policy
from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, ModelFns, Phase, Sampler, Spec, every
from ssl_jax.errors import UserError
from ssl_jax.models.common import create, run, shard_batch
from ssl_jax.models.gan.networks import STYLE_NETWORKS, build_network
from ssl_jax.objectives.adversarial import GAN_LOSSES, diversity, health, path_length, r1
from ssl_jax.sampling.latents import lerp, slerp

GAN_LOSS = GAN_LOSSES["non_saturating"]
W_DECAY = 0.995  # of the running mean of w, the center of truncation
ADAPT_EVERY = 4  # steps between updates of the augmentation probability


def mix_styles(first: jax.Array, second: jax.Array, crossover: jax.Array | int, layers: int) -> jax.Array:
    """Styles [N, D] of two latents -> [N, layers, D]: `first` for the first `crossover` layers, `second` for the others."""
    return jnp.where((jnp.arange(layers) < crossover)[:, None], first[:, None], second[:, None])


def truncate_styles(ws: jax.Array, center: jax.Array, psi: jax.Array | float, layers: int) -> jax.Array:
    """Truncation trick on the first `layers` of ws [N, L, D]: center + psi (w - center), with the center [D]."""
    near = center + psi * (ws - center)
    return jnp.where((jnp.arange(ws.shape[1]) < layers)[:, None], near, ws)


def ema_decay(step: jax.Array, batch_size: int, half_life: float, ramp: float) -> jax.Array:
    """Decay per step of a moving average with half-life min(half_life, ramp * images seen), in images; ramp=0: half_life."""
    life = jnp.minimum(half_life, ramp * step * batch_size) if ramp else half_life
    return 0.5 ** (batch_size / jnp.maximum(life, 1e-8))


def build(config, stages) -> Method:
    """`config.model`:

    generator, discriminator: networks (see `build_network`).
    latent: size.
    conditional: both networks are given class labels.
    mixing: probability of style mixing, that is, of a second latent from a random layer on.
    r1: weight (gamma) and interval in steps; with interval 1 the penalty is part of the discriminator's loss, not a phase of its
      own.
    path_length: weight and interval in steps; weight 0 removes the phase.
    augment: policy (names of operations), and target of the mean sign of D(real); with target 0 operations always apply.
    ema: half_life_examples and ramp of the generator's moving average (see `ema_decay`).
    truncation_layers: number of first layers that truncation changes.
    """
    model = config.model
    classes = config.data.num_classes if model.conditional else 0
    if model.conditional and not classes:
        raise UserError(
            f"config.model.conditional needs labels that are classes, and {config.data.name!r} has none; give "
            "--config.model.conditional=False"
        )
    policy, adaptive = check_policy(model.augment.policy), model.augment.target > 0
    views = make_views(config.views)
    size = jax.eval_shape(views, jax.ShapeDtypeStruct((1, *config.data.image_shape), jnp.uint8), jax.random.key(0)).shape[2]
    generator = build_network("generator", model.generator, size, classes, config.dtype, STYLE_NETWORKS)
    discriminator = build_network("discriminator", model.discriminator, size, classes, config.dtype, STYLE_NETWORKS)
    net, net_float32 = (generator_functions(module, model, classes) for module in (generator, generator.clone(dtype="float32")))

    def score(params, state, x, label, key):
        """Logits of images, augmented with the current probability."""
        p = state.mutable["augment"]["p"] if adaptive else 1.0
        return run(discriminator, params, {}, augment(x, key, policy, p), label, train=True)[0][0]

    def real_images(batch, key):
        return to_input(views(batch["image"], key)[:, 0], 0.5, 0.5)

    def r1_penalty(params, state, real, label, key):
        return model.r1.weight * r1(lambda x: score(params, state, x, label, key), real)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 3)
        x = real_images(batch, keys[0])
        latents = net.latents(keys[1], len(x))
        noise = jax.vmap(jax.random.key)(latents["noise"])
        params = {
            "generator": create(generator, keys[1], latents["z"], latents.get("label"), noise)[0],
            "discriminator": create(discriminator, keys[2], x, batch.get("label"))[0],
        }
        w = jnp.mean(net.to_w(params["generator"], latents), 0)
        mutable = {"ema": jax.tree.map(jnp.copy, params["generator"]), "w_average": w, "path_length": jnp.zeros(())}
        if adaptive:
            mutable["augment"] = {"p": jnp.zeros(()), "certainty": jnp.zeros(())}
        return params, mutable

    def generator_loss(train, state, batch, key):
        keys = jax.random.split(key)
        latents, w, ws = net.styles(train["generator"], keys[0], len(batch["image"]))
        fake = net.synthesize(train["generator"], ws, latents["noise"])
        on_fake = score(state.params["discriminator"], state, fake, latents.get("label"), keys[1])
        center = optax.incremental_update(jnp.mean(w, 0), state.mutable["w_average"], 1 - W_DECAY)
        logs = {"diversity": diversity(to_input(batch["image"], 0.5, 0.5), fake)}
        return GAN_LOSS.generator(on_fake), ({"w_average": center}, logs)

    def path_length_loss(train, state, batch, key):
        keys = jax.random.split(key)
        latents, _, ws = net.styles(train["generator"], keys[0], len(batch["image"]) // 2)  # half a batch saves memory
        value, length = path_length(
            lambda ws: net.synthesize(train["generator"], ws, latents["noise"]), ws, state.mutable["path_length"], keys[1]
        )
        return model.path_length.weight * model.path_length.interval * value, ({"path_length": length}, {"length": length})

    def discriminator_loss(train, state, batch, key):
        keys = jax.random.split(key, 5)
        real, label = real_images(batch, keys[0]), batch.get("label")
        latents, _, ws = net.styles(state.params["generator"], keys[1], len(real))
        fake = jax.lax.stop_gradient(net.synthesize(state.params["generator"], ws, latents["noise"]))
        on_real = score(train["discriminator"], state, real, label, keys[2])
        on_fake = score(train["discriminator"], state, fake, latents.get("label"), keys[3])
        value, logs, update = GAN_LOSS.discriminator(on_real, on_fake), health(on_real, on_fake), {}
        if model.r1.interval == 1:
            logs["penalty"] = r1_penalty(train["discriminator"], state, real, label, keys[4])
            value += logs["penalty"]
        if adaptive:
            update["augment"] = update_augmentation(state.mutable["augment"], state.step, on_real, model.augment.target)
            logs["augment_p"] = update["augment"]["p"]
        return value, (update, logs)

    def r1_loss(train, state, batch, key):
        keys = jax.random.split(key)
        value = r1_penalty(train["discriminator"], state, real_images(batch, keys[0]), batch.get("label"), keys[1])
        return model.r1.interval * value, ({}, {"penalty": value})

    def after(state):
        decay = ema_decay(state.step, config.batch_size, model.ema.half_life_examples, model.ema.ramp)
        ema = optax.incremental_update(state.params["generator"], state.mutable["ema"], 1 - decay)
        return {**state.mutable, "ema": ema}

    def discriminate_images(params, mutable, images, **options):
        """(logits [B], features) in inference mode; with score=False, which needs no labels, (None, features)."""
        return run(discriminator, params["discriminator"], {}, to_input(images, 0.5, 0.5), train=False, **options)[0]

    phases = [Phase("g", ("generator",), generator_loss)]
    if model.path_length.weight:
        phases.append(Phase("path", ("generator",), path_length_loss, when=every(model.path_length.interval)))
    phases.append(Phase("d", ("discriminator",), discriminator_loss))
    if model.r1.interval > 1:
        phases.append(Phase("r1", ("discriminator",), r1_loss, when=every(model.r1.interval)))
    unconditional = ModelFns(discriminate=lambda params, mutable, images: discriminate_images(params, mutable, images)[0])
    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape)), **({"label": Spec((), "int32")} if classes else {})},
        init=init,
        phases=tuple(phases),
        encode=lambda params, mutable, images: discriminate_images(params, mutable, images, score=False)[1],
        views=views,
        after=after,
        fns=ModelFns() if classes else unconditional,
        sampler=style_sampler(net, net_float32, model.truncation_layers),
        couples_batch=True,
    )


class Generator(NamedTuple):
    """Pure functions of a generator's parameters."""

    layers: int
    latents: Callable  # (key, count) -> {'z': [N, Z], 'noise': seeds [N], and with classes 'label' [N]}
    to_w: Callable  # (params, latents) -> w [N, D]
    synthesize: Callable  # (params, ws [N, layers, D], noise [N]) -> images in [-1, 1]
    styles: Callable  # (params, key, count) -> (latents, w [N, D], mixed ws [N, layers, D]) for training


def generator_functions(generator, model, classes: int) -> Generator:
    """Functions of the module `generator`, for `model` = config.model and so many classes (0: unconditional)."""

    def sample_latents(key, count):
        keys = jax.random.split(key, 3)
        z_and_noise = {"z": jax.random.normal(keys[0], (count, model.latent.size)), "noise": jax.random.bits(keys[1], (count,))}
        return {**z_and_noise, "label": jax.random.randint(keys[2], (count,), 0, classes)} if classes else z_and_noise

    def to_w(params, latents):
        return run(generator, params, {}, latents["z"], latents.get("label"), train=False, method="map")[0]

    def synthesize(params, ws, noise):
        keys = jax.vmap(jax.random.key)(noise)  # the noise of an image depends on its seed only
        return run(generator, params, {}, shard_batch(ws), keys, train=False, method="synthesize")[0]

    def styles(params, key, count):
        """Style mixing with a second latent per image; the batch shares one crossover layer."""
        keys = jax.random.split(key, 4)
        first = sample_latents(keys[0], count)
        w, other = to_w(params, first), to_w(params, {**first, "z": sample_latents(keys[1], count)["z"]})
        crossover = jax.random.randint(keys[2], (), 1, generator.layers)
        crossover = jnp.where(jax.random.uniform(keys[3]) < model.mixing, crossover, generator.layers)
        return first, w, mix_styles(w, other, crossover, generator.layers)

    return Generator(generator.layers, sample_latents, to_w, synthesize, styles)


def style_sampler(net: Generator, net_float32: Generator, truncation_layers: int) -> Sampler:
    """The sampler of the generator's moving average. Path lengths compare nearly equal images, so `between` computes in float32,
    with products in full precision on every accelerator.
    """

    def prepare(params, mutable, key, truncation=None):
        return {"params": mutable["ema"], "w_average": mutable["w_average"]}

    def sample(prepared, latents, truncation=None):
        return mix(prepared, latents, latents, net.layers, truncation)

    def mix(prepared, coarse, fine, layer, truncation=None):
        """The first `layer` layers have the styles of `coarse`; the other styles and the noise are those of `fine`."""
        w, other = net.to_w(prepared["params"], coarse), net.to_w(prepared["params"], fine)
        ws = mix_styles(w, other, layer, net.layers)
        if truncation is not None:
            ws = truncate_styles(ws, prepared["w_average"], truncation, truncation_layers)
        return jnp.clip((net.synthesize(prepared["params"], ws, fine["noise"]) + 1) / 2, 0, 1)

    @jax.default_matmul_precision("highest")
    def between_w(prepared, start, end, place):
        """Images at `place` on the line from w(start) to w(end), with the classes of `start`."""
        end = {**end, "label": start["label"]} if "label" in start else end
        w = lerp(net_float32.to_w(prepared["params"], start), net_float32.to_w(prepared["params"], end), place)
        ws = mix_styles(w, w, net_float32.layers, net_float32.layers)
        return (net_float32.synthesize(prepared["params"], ws, start["noise"]) + 1) / 2

    def between_z(prepared, start, end, place):
        """Images at `place` on the great circle from z(start) to z(end)."""
        point = {**start, "z": slerp(start["z"], end["z"], place)}
        return between_w(prepared, point, point, jnp.zeros_like(place))

    return Sampler(net.latents, prepare, sample, mix, between={"w": between_w, "z": between_z})


def update_augmentation(augmentation: dict, step: jax.Array, on_real: jax.Array, target: float) -> dict:
    """Adaptive augmentation: {'p', 'certainty'} after a batch with logits `on_real` [N]. p changes every ADAPT_EVERY steps."""
    p, certainty = augmentation["p"], augmentation["certainty"] + jnp.mean(jnp.sign(on_real)) / ADAPT_EVERY
    due = (step + 1) % ADAPT_EVERY == 0
    adapted = adapt(p, certainty, ADAPT_EVERY * len(on_real), target=target)
    return {"p": jnp.where(due, adapted, p), "certainty": jnp.where(due, 0.0, certainty)}
