"""What a trained generator makes: batches of pictures for evaluations, and grids for people."""

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
from ssl_jax.experiment.build import Experiment

GRID = 64  # pictures of the grid that is drawn at every evaluation, of the same latents each time


class OpenSampler(NamedTuple):
    """The `Sampler` of a method with the weights of a run. All calls run under the mesh of the run."""

    prepared: Callable[..., Any]  # (truncation=None) -> what the functions of the method sample with
    latents: Callable[[int, int], Mapping]  # (count, seed) -> latents, on the devices
    sample: Callable[..., np.ndarray]  # (latents, truncation) -> float32 [N, H, W, 3] in [0, 1], on the host
    unbound: Sampler  # the method's own, jitted

    def pictures(self, count: int, seed: int, truncation: float | None = None) -> np.ndarray:
        """`count` pictures of the latents of `seed`."""
        return self.sample(self.latents(count, seed), truncation)


def open_sampler(this: Experiment, state: State) -> OpenSampler:
    """The sampler is prepared with the seed of the run.

    Raises:
        UserError: the method does not sample.
    """
    if this.sampler is None:
        raise UserError(f"config.method={this.config.method!r} does not make pictures; give the --workdir of a generative run")

    def in_mesh(function):
        def call(*args):
            with jax.set_mesh(this.run.mesh):
                return function(*args)

        return call

    sampler = jax.tree.map(in_mesh, this.sampler)

    @functools.lru_cache(maxsize=1)
    def prepared(truncation=None):
        """Batch statistics belong to one truncation; the published modules of BigGAN hold a set for each."""
        return sampler.prepare(state.params, inference_state(state), jax.random.key(this.config.seed), truncation)

    return OpenSampler(
        prepared,
        lambda count, seed: sampler.latents(jax.random.key(seed), count),
        lambda latents, truncation=None: to_host(sampler.sample(prepared(truncation), latents, truncation), this.run.mesh),
        sampler,
    )


def open_samples(this: Experiment, state: State) -> Callable[..., Iterator[np.ndarray]] | None:
    """(count, seed, truncation=None, labels=None) -> uint8 batches [B, H, W, 3], `count` in all; None where the method does not sample.

    Batch i has the latents of seed + i * 2^20, with the classes `labels` [count] in place of those drawn, where given. Pictures are
    rounded to the nearest of 256 levels.
    """
    if this.sampler is None:
        return None
    size, opened = this.config.eval_batch_size, []

    def samples(count: int, seed: int, truncation: float | None = None, labels: np.ndarray | None = None):
        if not opened:  # prepared at the first use, once
            opened.append(open_sampler(this, state))
        for i, start in enumerate(range(0, count, size)):
            latents = opened[0].latents(size, seed + (i << 20))
            if labels is not None:
                latents = {**latents, "label": np.resize(labels[start : start + size], size).astype(np.int32)}
            pictures = opened[0].sample(latents, truncation)
            yield np.round(pictures[: count - start] * 255).astype(np.uint8)

    return samples


def open_labels(this: Experiment) -> Callable[[int, int], np.ndarray] | None:
    """(count, seed) -> int32 [count]: the classes that the pictures of `open_samples` were made for; None where there are none."""
    if this.sampler is None or "label" not in jax.eval_shape(lambda: this.method.sampler.latents(jax.random.key(0), 1)):
        return None
    size = this.config.eval_batch_size

    def labels(count: int, seed: int):
        with jax.set_mesh(this.run.mesh):
            drawn = [this.sampler.latents(jax.random.key(seed + (i << 20)), size)["label"] for i in range(-(-count // size))]
        return np.concatenate(to_host(drawn, this.run.mesh))[:count]

    return labels


def open_between(this: Experiment, state: State) -> Callable[..., Iterator[np.ndarray]] | None:
    """(space 'w' or 'z', seed, place [N]) -> float32 batches [B, H, W, 3] of about [0, 1]: pictures on the ways between latents.

    Batch i goes from the latents of seed + i * 2^20 to those of the seed after it. None where the method has no such ways.
    """
    if this.sampler is None or not this.sampler.between:
        return None
    size, opened = this.config.eval_batch_size, []

    def between(space: str, seed: int, place: np.ndarray):
        if not opened:
            opened.append(open_sampler(this, state))
        sampler = opened[0]
        for i, start in enumerate(range(0, len(place), size)):
            ends = (sampler.latents(size, seed + (i << 20) + end) for end in (0, 1))
            part = np.resize(place[start : start + size], size).astype(np.float32)
            pictures = sampler.unbound.between[space](sampler.prepared(), *ends, part)
            yield to_host(pictures, this.run.mesh)[: len(place) - start]

    return between


def save_samples(this: Experiment, state: State, step: int, workdir: Path) -> None:
    """`pictures/samples_<step>.png`: the pictures of the same latents as at every other step."""
    pictures = open_sampler(this, state).pictures(GRID, this.config.seed)
    save_grid(pictures, workdir / "pictures" / f"samples_{step:08d}.png")
