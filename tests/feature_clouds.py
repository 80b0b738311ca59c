"""Synthetic features for tests of evaluators, and device meshes."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ssl_jax.evals.context import Context
from ssl_jax.evals.lib.features import Features


def mesh_of(count):
    return Mesh(
        np.array(jax.devices()[:count]).reshape(-1, 2 if count > 1 else 1, 1),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )


@functools.cache
def blobs(n, dim=16, classes=5, spread=1.0, seed=0):
    """Overlapping Gaussian classes with an offset and unequal feature scales."""
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((classes, dim))
    y = generator.integers(0, classes, n).astype(np.int32)
    x = centers[y] + 1.5 * spread * generator.standard_normal((n, dim))
    return Features((x * np.linspace(0.2, 3, dim) + 2).astype(np.float32), y)


def fake_context(by_split, **options):
    """A context whose 'images' are the features."""

    def open_batches(split):
        yield {"image": by_split[split].x, "label": by_split[split].y, "_valid": np.ones(len(by_split[split].y))}

    return Context(lambda x: {"pooled": x}, open_batches, **options)
