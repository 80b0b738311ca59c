"""Samples of a trained generator: batches for evaluations and image grids for people."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ssl_jax.engine.method import Sampler, State, inference_state
from ssl_jax.engine.pictures import save_grid
from ssl_jax.engine.sharding import to_host
from ssl_jax.errors import UserError
from ssl_jax.experiment.record import Experiment

GRID = 64  # samples in the grid of every evaluation, from the same latents each time


class OpenSampler(NamedTuple):
    """The `Sampler` of a method, bound to the weights and the mesh of a run."""

    prepared: Callable[..., Any]  # (truncation=None) -> what `Sampler.prepare` returns; computed once per truncation
    latents: Callable[[int, int], Mapping]  # (count, seed) -> latents, on the devices
    sample: Callable[..., np.ndarray]  # (latents, truncation) -> float32 [N, H, W, 3] in [0, 1], on the host
    unbound: Sampler  # the method's own, jitted

    def pictures(self, count: int, seed: int, truncation: float | None = None) -> np.ndarray:
        """Samples of the latents of `seed`, float32 [count, H, W, 3] in [0, 1]."""
        return self.sample(self.latents(count, seed), truncation)


def open_sampler(experiment: Experiment, state: State) -> OpenSampler:
    """Bind the sampler to `state`; it is prepared with the seed of the run.

    Raises:
        UserError: the method does not sample.
    """
    if experiment.sampler is None:
        raise UserError(f"config.method={experiment.config.method!r} does not sample; give the --workdir of a generative run")

    def in_mesh(function):
        def call(*args):
            with jax.set_mesh(experiment.run.mesh):
                return function(*args)

        return call

    sampler = jax.tree.map(in_mesh, experiment.sampler)

    @functools.lru_cache(maxsize=1)
    def prepared(truncation=None):
        """Batch statistics depend on the truncation; the published modules of BigGAN hold a set for each."""
        return sampler.prepare(state.params, inference_state(state), jax.random.key(experiment.config.seed), truncation)

    return OpenSampler(
        prepared,
        lambda count, seed: sampler.latents(jax.random.key(seed), count),
        lambda latents, truncation=None: to_host(sampler.sample(prepared(truncation), latents, truncation), experiment.run.mesh),
        sampler,
    )


def open_samples(experiment: Experiment, state: State) -> Callable[..., Iterator[np.ndarray]] | None:
    """(count, seed, truncation=None, labels=None) -> uint8 batches [B, H, W, 3], `count` images; None for a method without sampler.

    Batch i has the latents of seed + i * 2^20. `labels` [count], where given, replace the sampled classes. Values are rounded to
    the nearest of 256 levels.
    """
    if experiment.sampler is None:
        return None
    size, opened = experiment.config.eval_batch_size, []

    def samples(count: int, seed: int, truncation: float | None = None, labels: np.ndarray | None = None):
        if not opened:  # prepared at the first use, once
            opened.append(open_sampler(experiment, state))
        for i, start in enumerate(range(0, count, size)):
            latents = opened[0].latents(size, seed + (i << 20))
            if labels is not None:
                latents = {**latents, "label": np.resize(labels[start : start + size], size).astype(np.int32)}
            pictures = opened[0].sample(latents, truncation)
            yield np.round(pictures[: count - start] * 255).astype(np.uint8)

    return samples


def open_labels(experiment: Experiment) -> Callable[[int, int], np.ndarray] | None:
    """(count, seed) -> int32 [count], the classes of the samples of `open_samples`; None for an unconditional method."""
    if experiment.sampler is None or "label" not in jax.eval_shape(lambda: experiment.method.sampler.latents(jax.random.key(0), 1)):
        return None
    size = experiment.config.eval_batch_size

    def labels(count: int, seed: int):
        with jax.set_mesh(experiment.run.mesh):
            keys = (jax.random.key(seed + (i << 20)) for i in range(-(-count // size)))
            sampled = [experiment.sampler.latents(key, size)["label"] for key in keys]
        return np.concatenate(to_host(sampled, experiment.run.mesh))[:count]

    return labels


def open_between(experiment: Experiment, state: State) -> Callable[..., Iterator[np.ndarray]] | None:
    """(space 'w' or 'z', seed, place [N]) -> float32 batches [B, H, W, 3] of about [0, 1]: images on paths between latents.

    `place` in [0, 1] is the position on the path. Batch i goes from the latents of seed + i * 2^20 to those of the next seed. None
    where the method does not interpolate.
    """
    if experiment.sampler is None or not experiment.sampler.between:
        return None
    size, opened = experiment.config.eval_batch_size, []

    def between(space: str, seed: int, place: np.ndarray):
        if not opened:
            opened.append(open_sampler(experiment, state))
        sampler = opened[0]
        for i, start in enumerate(range(0, len(place), size)):
            ends = (sampler.latents(size, seed + (i << 20) + end) for end in (0, 1))
            part = np.resize(place[start : start + size], size).astype(np.float32)
            pictures = sampler.unbound.between[space](sampler.prepared(), *ends, part)
            yield to_host(pictures, experiment.run.mesh)[: len(place) - start]

    return between


def save_samples(experiment: Experiment, state: State, step: int, workdir: Path) -> None:
    """Write `pictures/samples_<step>.png`, from the same latents at every step."""
    pictures = open_sampler(experiment, state).pictures(GRID, experiment.config.seed)
    save_grid(pictures, workdir / "pictures" / f"samples_{step:08d}.png")
