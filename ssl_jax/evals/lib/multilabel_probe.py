"""Linear probe of images that may have several classes: a logistic regression per class, and their mean average precision.

All classes share one l2, chosen on held-out training images, as the common protocol on PASCAL VOC 2007 does for its SVMs. l2 is
1 / (C n) of scikit-learn's LogisticRegression.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.metrics import average_precision_score

from ssl_jax.engine.sharding import put_global
from ssl_jax.errors import UserError
from ssl_jax.evals.lib.features import Features, flat_mesh, moments, padded
from ssl_jax.evals.lib.linear_probe import RESIDENT_BYTES, TOLERANCE, Probe, predict, replicate_tree


class Chosen(NamedTuple):
    """The probe with the best l2, refitted on the whole bank."""

    probe: Probe  # one head
    l2: float
    validation: np.ndarray  # [l2] held-out mean average precision in percent
    unconverged: int  # fits that ended at the largest number of iterations


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the average precision (scikit-learn's, without interpolation) in percent; both [N, C].

    A class without an example is left out of the mean; without any, the value is NaN.
    """
    values = [average_precision_score(labels[:, c], scores[:, c]) for c in range(labels.shape[1]) if labels[:, c].any()]
    return 100 * float(np.mean(values)) if values else float("nan")


def fit(
    bank: Features, l2: Sequence[float], iterations: int, standardize: bool, validation: float, seed: int, mesh: Mesh | None
) -> Chosen:
    """Choose the l2 with the best mean average precision on held-out images (the first of equals), and refit on the whole bank.

    bank.y: int [N, C] of 0 and 1.

    Raises UserError for fewer than two images, or a bank that is too large for the memory of the devices.
    """
    count, dim = bank.x.shape
    mesh = flat_mesh(mesh)
    if count < 2:
        raise UserError("a linear probe needs at least two training images; check the split")
    if 4 * count * dim / mesh.size > RESIDENT_BYTES:
        raise UserError(f"linear probe of several labels would keep {4 * count * dim / mesh.size / 2**30:.0f} GiB on each device")
    scale = moments(bank.x) if standardize else (np.zeros(dim, np.float32), np.ones(dim, np.float32))
    order = np.random.default_rng(seed).permutation(count)
    held_out = min(max(1, round(validation * count)), count - 1)
    train, rest = np.sort(order[held_out:]), np.sort(order[:held_out])
    found, ended = zip(*(_train(bank, train, value, iterations, scale, mesh) for value in l2), strict=True)
    scores = [mean_average_precision(predict(probe, bank.x[rest], mesh)[:, 0], bank.y[rest]) for probe in found]
    best = 0 if np.isnan(scores).all() else int(np.nanargmax(scores))  # NaN: no held-out image has a class
    refitted, last = _train(bank, np.arange(count), l2[best], iterations, scale, mesh)
    return Chosen(refitted, l2[best], np.asarray(scores), len(l2) + 1 - sum(ended) - last)


def _train(bank, rows, l2, iterations, scale, mesh):
    """L-BFGS on the host, with loss and gradient on the devices. Returns (the probe, whether it converged)."""
    dim, classes = bank.x.shape[1], bank.y.shape[1]
    size = -(-len(rows) // mesh.size) * mesh.size
    split = NamedSharding(mesh, PartitionSpec("shard"))
    x, y = (put_global(padded(array[rows].astype(np.float32), size), split) for array in ((bank.x - scale[0]) / scale[1], bank.y))
    weight = put_global(padded(np.full(len(rows), 1 / len(rows), np.float32), size), split)

    def objective(flat):
        kernel, bias = flat[: dim * classes].reshape(dim, classes), flat[dim * classes :]
        losses, (of_kernel, of_bias) = jax.device_get(_losses(x, y, weight, *replicate_tree((kernel, bias), mesh), mesh=mesh))
        value = losses.sum(dtype=np.float64) + 0.5 * l2 * np.square(kernel).sum()
        return value, np.concatenate([(of_kernel + l2 * kernel).ravel(), of_bias]).astype(np.float64)

    options = {"maxiter": iterations, "gtol": TOLERANCE, "ftol": 1e-12}
    found = scipy.optimize.minimize(objective, np.zeros((dim + 1) * classes), jac=True, method="L-BFGS-B", options=options)
    kernel, bias = found.x[: dim * classes].reshape(dim, 1, classes), found.x[dim * classes :][None]
    return Probe(kernel, bias, *scale), found.nit < iterations


@functools.partial(jax.jit, static_argnames="mesh")
def _losses(x, y, weight, kernel, bias, *, mesh):
    """(weighted losses [N], gradients); the caller sums the losses in float64."""

    def loss(kernel, bias):
        logits = jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias
        losses = weight * optax.sigmoid_binary_cross_entropy(logits, y).sum(1)
        return losses.sum(), losses

    grads, losses = jax.grad(loss, (0, 1), has_aux=True)(kernel, bias)
    return jax.lax.with_sharding_constraint((losses, grads), NamedSharding(mesh, PartitionSpec()))
