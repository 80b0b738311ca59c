"""L2-regularized logistic regression by L-BFGS: of classes (softmax) or of label vectors (a sigmoid per class).

The loss is the mean cross-entropy + l2/2 |W|^2, so that l2 is 1/(C n) of scikit-learn. L-BFGS runs on the host, with loss and
gradient on the devices, which keep the rows.

Directions are scaled to a curvature of about one by an estimate of the feature covariance. The optimum is the same, and it takes
about ten iterations instead of hundreds. Where the dimensions or the rows are few, the features are rotated to their principal
directions: without rows in other directions the kernel has no part there (`second_moments`), so they are left out.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_jax.engine.sharding import put_global
from ssl_jax.errors import UserError
from ssl_jax.evals.lib.features import Features, moments, padded, replicate_tree
from ssl_jax.evals.lib.second_moments import HIGHEST, covariances, gram_of_rows, sum_of_rows

RESIDENT_BYTES = 8 * 2**30  # most bytes of features per device
LARGEST_BASIS = 2048  # most dimensions or rows for which the features are rotated
LEADING = 256  # directions of largest variance that are scaled above that (raw pixels)
TOLERANCE = 1e-5  # largest gradient entry at which L-BFGS ends, scaled to curvature one
CONVERGED = 1e-4  # the same of a fit that counts as converged: the rounding of few float32 losses may hide the last factor of ten


class Directions(NamedTuple):
    """Scaled features in coordinates in which the loss is nearly round, for a kernel k = A S w.

    With a `rotation` these are the eigenvectors of the covariance, A divides by their deviations, and S is the identity. Without,
    since it would cost more than it saves, A divides axes by their deviations, and S scales the `leading` directions of the
    largest variance among these axes, and all others alike.
    """

    center: np.ndarray  # [D]
    rotation: np.ndarray | None  # [D, R], orthonormal columns
    variances: np.ndarray  # [R], of the rotated features, or [D], of the axes
    leading: tuple[np.ndarray, np.ndarray] | None = None  # variances [k] and orthonormal directions [D, k]

    def scaling(self, l2: float, share: float):
        """Three functions of [R, C]: w -> kernel, gradient of the kernel -> that of w, kernel -> w.

        share: curvature of the cross-entropy at zero, as a multiple of the variance.
        """
        if self.leading is None:
            curvature = np.maximum(self.variances, 0) * share
            along = 1 / np.sqrt(curvature + l2 + 1e-6 * curvature.max())[:, None]
            return (lambda w: w * along), (lambda g: g * along), (lambda k: k / along)
        axes, (values, vectors) = 1 / np.sqrt(self.variances)[:, None], self.leading
        rest = max(len(axes) - values.sum(), 0) / max(len(axes) - len(values), 1)
        many, few = (np.sqrt(np.maximum(x, 0) * share + l2 + 1e-6 * share) for x in (rest, values[:, None]))

        def spread(w, power):
            inside = vectors.T @ w
            return w * many**power + vectors @ ((few**power - many**power) * inside)

        return (lambda w: axes * spread(w, -1)), (lambda g: spread(axes * g, -1)), (lambda k: spread(k / axes, 1))


def directions(bank: Features, scale, mesh: Mesh) -> Directions:
    """The directions of the rows [N, D] of a bank, after `scale`, which (mean, std) [D] standardize.

    From the covariance of a sample of the rows for few dimensions, since any rotation serves; from all rows if those are few.
    """
    count, dim = bank.x.shape
    if dim <= LARGEST_BASIS:
        rows = np.arange(0, count, max(1, count // max(8192, 4 * dim)))
        covariance, center, *_ = covariances(bank.x, np.zeros((count, 1), np.float32), rows, scale, mesh)
        variances, rotation = np.linalg.eigh(covariance)
        return Directions(center, rotation, variances)
    if count <= LARGEST_BASIS:
        gram, center = gram_of_rows(bank.x, scale)
        squares, vectors = np.linalg.eigh(gram)
        there = squares > 1e-12 * squares[-1]  # the centered rows sum to zero, and some may be equal
        rotation = sum_of_rows(bank.x, scale, center, vectors[:, there] / np.sqrt(squares[there]))
        return Directions(center, rotation, squares[there] / count)
    mean, std = moments(bank.x)
    rows = (bank.x[:: max(1, count // 4096)] - mean) / std
    vectors = np.random.default_rng(0).standard_normal((dim, min(LEADING, dim // 2, len(rows))), np.float32)
    for _ in range(2):  # subspace iteration
        vectors = np.linalg.qr(rows.T @ (rows @ vectors))[0]
    projected = rows @ vectors
    values, inside = np.linalg.eigh((projected.T @ projected / len(rows)).astype(np.float64))
    return Directions((mean - scale[0]) / scale[1], None, np.square(std / scale[1]), (values, vectors @ inside))


def fit(bank: Features, rows: np.ndarray, scale, grid, mesh: Mesh, *, iterations: int, within: Directions):
    """Fit the rows `rows` of a bank for one (l2,) of `grid` after the other.

    Args:
        bank: x [N, D]; y int [N] of classes, or [N, C] of 0 and 1.
        scale: (mean, std) [D] that standardize the features.
        within: `directions` of the bank.

    Returns:
        kernels [D, H, C], biases [H, C], and the largest entry of each final gradient [H].

    Raises:
        UserError: the rows do not fit into the memory of the devices.
    """
    import scipy.optimize  # takes half a second, which a training run need not wait for

    several = bank.y.ndim == 2
    classes = bank.y.shape[1] if several else int(bank.y.max()) + 1
    share = 1 / 4 if several else (classes - 1) / classes**2
    basis, center, dim = within.rotation, within.center, len(within.variances)
    size = -(-len(rows) // mesh.size) * mesh.size
    per_device = 4 * size * max(dim, bank.x.shape[1]) / mesh.size
    if per_device > RESIDENT_BYTES:
        raise UserError(f"linear probe lbfgs would keep {per_device / 2**30:.0f} GiB on each device; use solver='sgd'")
    split = NamedSharding(mesh, PartitionSpec("shard"))
    x, y = (put_global(padded(array[rows], size), split) for array in (bank.x, bank.y))
    weight = put_global(padded(np.full(len(rows), 1 / len(rows), np.float32), size), split)
    x = _rotate(x, *replicate_tree((center, *scale), mesh), None if basis is None else replicate_tree(basis, mesh))
    kernels, biases = np.zeros((len(center), len(grid), classes)), np.zeros((len(grid), classes))
    kernel, bias, gradients = np.zeros((dim, classes)), np.zeros(classes), np.zeros(len(grid))
    for head in np.argsort([-value for (value,) in grid]):  # the strongest first: each one starts at the previous optimum
        (l2,) = grid[head]
        to_kernel, to_gradient, from_kernel = within.scaling(l2, share)

        def objective(flat, to_kernel=to_kernel, to_gradient=to_gradient, l2=l2):
            scaled, bias = flat[:-classes].reshape(dim, classes), flat[-classes:]
            kernel = to_kernel(scaled)
            losses, grads = jax.device_get(losses_and_grads(x, y, weight, *replicate_tree((kernel.T, bias), mesh), mesh=mesh))
            value = losses.sum(dtype=np.float64) + 0.5 * l2 * np.square(kernel).sum()
            return value, np.concatenate([to_gradient(grads[0].T + l2 * kernel).ravel(), grads[1]])

        start = np.concatenate([from_kernel(kernel).ravel(), bias])
        # Small penalties have flat optima: ending by the decrease of the loss (ftol) would be too early.
        options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxls": 10, "gtol": TOLERANCE, "ftol": 1e-12}
        found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        flat, gradients[head] = found.x, np.abs(found.jac).max()
        kernel, bias = to_kernel(flat[:-classes].reshape(dim, classes)), flat[-classes:]
        kernels[:, head] = kernel if basis is None else basis @ kernel
        biases[head] = bias - center @ kernels[:, head]
    return kernels, biases, gradients


@functools.partial(jax.jit, donate_argnums=0)
def _rotate(x, center, mean, std, basis):
    x = (x - mean) / std - center
    return x if basis is None else jnp.matmul(x, basis, precision=HIGHEST)


@functools.partial(jax.jit, static_argnames="mesh")
def losses_and_grads(x, y, weight, kernel, bias, *, mesh):
    """(weighted losses [N], gradients) for a kernel [C, D]. The caller sums the losses in float64: a line search needs that precision.

    With the kernel on the left neither product transposes the rows, so a CPU takes a third of the time.
    """

    def loss(kernel, bias):
        logits = jnp.einsum("cd,nd->cn", kernel, x, precision=HIGHEST).T + bias
        if y.ndim == 2:
            losses = optax.sigmoid_binary_cross_entropy(logits, y.astype(logits.dtype)).sum(1)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        losses = weight * losses
        return losses.sum(), losses

    grads, losses = jax.grad(loss, (0, 1), has_aux=True)(kernel, bias)
    return jax.lax.with_sharding_constraint((losses, grads), NamedSharding(mesh, PartitionSpec()))
