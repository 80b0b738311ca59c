"""Sampling from a trained generator that maps one latent vector (and a label) to an image; several methods share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.common import run
from ssl_jax.models.gan.standing_stats import standing_stats, update_ema
from ssl_jax.sampling import latents as latent_distributions

Tree = Any
Latents = Mapping[str, jax.Array]  # 'z' [N, Z] and, of a conditional generator, 'label' int32 [N]


def latent_sampler(kind: str, size: int) -> Callable[[jax.Array, int], Latents]:
    """The function (key, count) -> {'z': float32 [count, size]}; `kind` as in `sampling.latents.sample_latents`."""
    return lambda key, count: {"z": latent_distributions.sample_latents(kind, key, (count, size))}


def generator_inputs(latents: Latents) -> tuple[jax.Array, ...]:
    """The positional arguments of a generator: (z, label), or (z,) without classes."""
    return (latents["z"], latents["label"]) if "label" in latents else (latents["z"],)


def to_unit(x: jax.Array) -> jax.Array:
    """Images in [-1, 1] -> [0, 1], clipped."""
    return jnp.clip((x + 1) / 2, 0, 1)


def ema_of_generator(decay: float, start: int) -> Callable[[Any], dict[str, Tree]]:
    """`Method.after`: mutable['ema'] is a copy of params['generator'] before the step `start`, then its moving average."""

    def after(state):
        return {**state.mutable, "ema": update_ema(state.mutable["ema"], state.params["generator"], state.step, decay, start)}

    return after


def generator_sampler(
    generator: nn.Module,
    sample_latents: Callable[[jax.Array, int], Latents],
    kind: str,
    batch_size: int,
    ema: bool = True,
    to_image: Callable[[jax.Array], jax.Array] = to_unit,
) -> tuple[Callable, Callable, Callable]:
    """(latents, prepare, sample) of `engine.method.Sampler` for params['generator'] and its state mutable['generator'].

    `prepare` recomputes batch statistics for the weights that sample ("standing statistics", Brock et al. 2019), on latents with
    the same truncation as the samples.

    Args:
        kind: of the latents; only 'normal' latents can be truncated.
        batch_size: of each pass that computes statistics.
        ema: sample with the moving average mutable['ema'] of the weights; False: with the weights.
        to_image: output of the generator -> [N, h, w, 3] in [0, 1].
    """

    def inputs(latents, truncation):
        return generator_inputs({**latents, "z": latent_distributions.truncate_latents(kind, latents["z"], truncation)})

    def prepare(params, mutable, key, truncation=None):
        weights = mutable["ema"] if ema else params["generator"]

        def batch(key):
            return inputs(sample_latents(key, batch_size), truncation)

        return {"params": weights, "state": standing_stats(generator, weights, mutable["generator"], batch, key)}

    def sample(prepared, latents, truncation=None):
        x, _ = run(generator, prepared["params"], prepared["state"], *inputs(latents, truncation), train=False)
        return to_image(x)

    return sample_latents, prepare, sample
