"""Linear probes of frozen features: a grid of probes is trained at once and the best on held-out training examples is chosen.

Three solvers for one linear map [D, C]:

sgd    cross-entropy, Nesterov momentum .9, cosine to 0, zero init (SimCLR's protocol on cached features); the grid is
       learning rates x weight decays; any bank size, streamed through the device in chunks.
lbfgs  L2-regularized multinomial logistic regression (Kornblith et al. 2019, section 3): mean cross-entropy
       + l2/2 |W|^2, so that l2 is 1/(C n) of scikit-learn. The bank stays on the devices, split over them.
       It ends when the gradient is small, or after `iterations`; the protocol says so where one of the fits did not converge.
ridge  least squares on targets -1, 1, closed form: mean squared error + l2 |W|^2, so that l2 is alpha/n of
       scikit-learn.

Intercepts are never regularized.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_jax.engine.sharding import put_global
from ssl_jax.errors import UserError
from ssl_jax.evals.context import require_labels
from ssl_jax.evals.lib.features import Features, chunks, flat_mesh, hits, moments, padded

log = logging.getLogger(__name__)
Solver = Literal["sgd", "lbfgs", "ridge"]
L2 = tuple(10.0**exponent for exponent in range(-6, 2))
DEFAULTS = {
    "sgd": {
        "learning_rates": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        "weight_decays": (0.0,),
        "epochs": 30,
        "batch_size": 1024,
    },
    "lbfgs": {"l2": L2, "iterations": 1000},
    "ridge": {"l2": L2},
}
CHUNK_BYTES = 256 * 2**20  # bytes of features at a time, over all devices
RESIDENT_BYTES = 8 * 2**30  # most bytes of features per device for lbfgs
LARGEST_BASIS = 2048  # most dimensions for which lbfgs works in the eigenbasis
LEADING = 256  # directions of largest variance that lbfgs scales above that (raw pixels)
TOLERANCE = 1e-5  # largest gradient entry at which lbfgs ends, scaled to curvature one
CONVERGED = 1e-4  # the same of a fit that counts as converged: the rounding of few float32 losses may hide the last factor of ten
HIGHEST = jax.lax.Precision.HIGHEST  # the default precision on accelerators is bfloat16 or TF32
rows_first, replicated = PartitionSpec("shard"), PartitionSpec()


class Probe(NamedTuple):
    """logits = ((x - mean) / std) @ kernel + bias, for H heads that share the standardization."""

    kernel: np.ndarray  # [D, H, C] float32
    bias: np.ndarray  # [H, C] float32
    mean: np.ndarray  # [D] float32
    std: np.ndarray  # [D] float32


class Fit(NamedTuple):
    """The chosen probe, refitted on the whole bank."""

    probe: Probe  # one head
    setting: tuple[float, ...]  # (learning rate, weight decay), or (l2,)
    validation: np.ndarray  # [settings] held-out accuracy in percent
    grid: tuple[tuple[float, ...], ...]  # [settings]
    fits: int = 0  # fits of lbfgs: one per setting, and the refit
    unconverged: int = 0  # how many of them ended at the largest number of iterations


def fit(
    bank: Features,
    solver: Solver = "sgd",
    standardize: bool = True,
    validation: float = 0.1,
    seed: int = 0,
    mesh: Mesh | None = None,
    **options,
) -> Fit:
    """Train the grid on part of the bank, choose by accuracy on the rest (the first of equals), refit on the whole bank.

    Raises UserError for a bank with one class or fewer than two examples, or one too large for lbfgs.
    """
    require_labels(bank, "a linear probe")
    options = solver_options(solver, options)
    mesh = flat_mesh(mesh)
    order = np.random.default_rng(seed).permutation(len(bank.y))
    held_out = min(max(1, round(validation * len(order))), len(order) - 1)
    scale = moments(bank.x) if standardize else _no_scale(bank.x.shape[1])
    if solver == "sgd":
        grid = tuple(itertools.product(options.pop("learning_rates"), options.pop("weight_decays")))
        options["seed"] = seed
    else:
        grid = tuple((value,) for value in options.pop("l2"))
    if solver == "lbfgs":
        options["eigenbasis"] = _eigenbasis(bank, scale, mesh)
    train = {"sgd": _train_sgd, "lbfgs": _train_lbfgs, "ridge": _train_ridge}[solver]
    kernel, bias, *gradients = train(bank, np.sort(order[held_out:]), scale, grid, mesh, **options)
    probe = Probe(kernel, bias, *scale)
    rows = np.sort(order[:held_out])
    correct = np.zeros(len(grid))
    for start, stop in chunks(len(rows), 65536):
        part = rows[start:stop]
        scores = predict(probe, bank.x[part], mesh)
        correct += [hits(scores[:, head], bank.y[part], 1).sum() for head in range(len(grid))]
    setting = grid[int(correct.argmax())]
    kernel, bias, *last = train(bank, np.arange(len(bank.y)), scale, (setting,), mesh, **options)
    gradients = np.concatenate([*gradients, *last, ()])
    unconverged = [f"l2={(*grid, setting)[i][0]:g}" for i in np.flatnonzero(gradients > CONVERGED)]
    if unconverged:
        log.warning(
            "linear probe lbfgs: %d of %d fits (%s) did not converge in %d iterations, with a gradient of up to %.1g instead of %g;"
            " raise the option iterations, or give larger l2", len(unconverged), len(gradients), ", ".join(unconverged),
            options["iterations"], max(gradients), CONVERGED,
        )  # fmt: skip
    return Fit(Probe(kernel, bias, *scale), setting, 100 * correct / held_out, grid, len(gradients), len(unconverged))


def convergence(*fits: Fit) -> str:
    """The part of a protocol about fits that did not converge; '' if all did."""
    unconverged = sum(each.unconverged for each in fits)
    return f" ({unconverged} of {sum(each.fits for each in fits)} fits not converged)" if unconverged else ""


def predict(probe: Probe, x: np.ndarray, mesh: Mesh | None = None) -> np.ndarray:
    """Logits [N, H, C] float32 of x [N, D], in chunks over the devices."""
    mesh = flat_mesh(mesh)
    size = _chunk_rows(x.shape[1], len(x), mesh)
    probe = replicate_tree(probe, mesh)
    logits = []
    for start, stop in chunks(len(x), size):
        part = put_global(padded(x[start:stop], size), NamedSharding(mesh, rows_first))
        logits.append(jax.device_get(_logits(probe, part, mesh=mesh))[: stop - start])
    return np.concatenate(logits)


def replicate_tree(tree, mesh):
    """Put every array of `tree` on all devices."""
    return jax.tree.map(lambda leaf: put_global(np.asarray(leaf, np.float32), NamedSharding(mesh, replicated)), tree)


@functools.partial(jax.jit, static_argnames="mesh")
def _logits(probe, x, *, mesh):
    out = _forward(probe.kernel, probe.bias, (x - probe.mean) / probe.std)
    return jax.lax.with_sharding_constraint(out, NamedSharding(mesh, replicated))


def _forward(kernel, bias, x):
    return jnp.einsum("nd,dhc->nhc", x, kernel, precision=HIGHEST) + bias


def _train_sgd(bank, rows, scale, grid, mesh, *, epochs, batch_size, seed):
    """Train all settings of `grid` as heads of one scan over batches that the host shuffles. Returns kernel, bias."""
    classes, n = int(bank.y.max()) + 1, len(rows)
    batch = min(batch_size, n)
    batch = -(-batch // mesh.size) * mesh.size
    steps = -(-n // batch)
    rates, decays = np.float32(grid).T
    kernel = np.zeros((bank.x.shape[1], len(grid), classes), np.float32)
    bias = np.zeros(kernel.shape[1:], np.float32)
    constants = replicate_tree((*scale, rates * batch / 256, decays, 1 / (epochs * steps)), mesh)
    carry = replicate_tree(((kernel, bias), (kernel, bias), 0), mesh)
    generator = np.random.default_rng([seed, 1])
    split = NamedSharding(mesh, PartitionSpec(None, "shard"))
    per_chunk = max(1, CHUNK_BYTES // (4 * batch * bank.x.shape[1]))
    for _ in range(epochs):
        order = np.resize(rows[generator.permutation(n)], (steps, batch))  # the last batch is filled with the first rows
        for start, stop in chunks(steps, per_chunk):
            part = order[start:stop]
            x, y = put_global(bank.x[part], split), put_global(bank.y[part], split)
            jax.block_until_ready(carry)  # at most two chunks on the devices: the host must not run ahead
            carry = _sgd_steps(carry, x, y, constants)
    return jax.device_get(carry[0])


@functools.partial(jax.jit, donate_argnums=0)
def _sgd_steps(carry, x, y, constants):
    """x [steps, B, D], y [steps, B]: one Nesterov step of every head per batch."""
    mean, std, rates, decays, pace = constants

    def loss(params, x, y):
        logits = _forward(*params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[:, None].repeat(logits.shape[1], 1))
        return losses.mean(0).sum()  # heads are independent: the gradient of the sum is that of each head

    def step(carry, batch):
        params, momentum, done = carry
        x, y = batch
        kernel_grad, bias_grad = jax.grad(loss)(params, (x - mean) / std, y)
        grads = (kernel_grad + decays[:, None] * params[0], bias_grad)
        rate = rates[:, None] * 0.5 * (1 + jnp.cos(jnp.pi * done * pace))
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        params = jax.tree.map(lambda p, m, g: p - rate * (g + 0.9 * m), params, momentum, grads)
        return (params, momentum, done + 1), None

    return jax.lax.scan(step, carry, (x, y))[0]


def _train_lbfgs(bank, rows, scale, grid, mesh, *, iterations, eigenbasis):
    """L-BFGS on the host, with loss and gradient on the devices, for one l2 after the other. Returns kernel, bias, and the
    largest entry of each final gradient.

    Directions are scaled to a curvature of about one, by an estimate of the feature covariance (see `_Directions`). The optimum is
    the same, and it takes about ten iterations instead of hundreds.
    """
    per_device = 4 * len(rows) * bank.x.shape[1] / mesh.size
    if per_device > RESIDENT_BYTES:
        raise UserError(f"linear probe lbfgs would keep {per_device / 2**30:.0f} GiB on each device; use solver='sgd'")
    dim, classes = bank.x.shape[1], int(bank.y.max()) + 1
    basis, center = eigenbasis.rotation, eigenbasis.center
    size = -(-len(rows) // mesh.size) * mesh.size
    split = NamedSharding(mesh, rows_first)
    x, y = (put_global(padded(array[rows], size), split) for array in (bank.x, bank.y))
    weight = put_global(padded(np.full(len(rows), 1 / len(rows), np.float32), size), split)
    x = _rotate(x, *replicate_tree((center, *scale), mesh), None if basis is None else replicate_tree(basis, mesh))
    kernels, biases = np.zeros((dim, len(grid), classes)), np.zeros((len(grid), classes))
    kernel, bias, gradients = np.zeros((dim, classes)), np.zeros(classes), np.zeros(len(grid))
    for head in np.argsort([-value for (value,) in grid]):  # the strongest first: each one starts at the previous optimum
        (l2,) = grid[head]
        to_kernel, to_gradient, from_kernel = eigenbasis.scaling(l2, classes)

        def objective(flat, to_kernel=to_kernel, to_gradient=to_gradient, l2=l2):
            scaled, bias = flat[:-classes].reshape(dim, classes), flat[-classes:]
            kernel = to_kernel(scaled)
            losses, grads = jax.device_get(
                _losses_and_grads(x, y, weight, *replicate_tree((kernel, bias), mesh), mesh=mesh)
            )
            value = losses.sum(dtype=np.float64) + 0.5 * l2 * np.square(kernel).sum()
            return value, np.concatenate([to_gradient(grads[0] + l2 * kernel).ravel(), grads[1]])

        start = np.concatenate([from_kernel(kernel).ravel(), bias])
        # Small penalties have flat optima: ending by the decrease of the loss (ftol) would be too early.
        options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxls": 10, "gtol": TOLERANCE, "ftol": 1e-12}
        found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        flat, gradients[head] = found.x, np.abs(found.jac).max()
        kernel, bias = to_kernel(flat[:-classes].reshape(dim, classes)), flat[-classes:]
        kernels[:, head] = kernel if basis is None else basis @ kernel
        biases[head] = bias - center @ kernels[:, head]
    return kernels, biases, gradients


class _Directions(NamedTuple):
    """Scaled features in coordinates in which the loss is nearly round, for a kernel k = A S w.

    Up to LARGEST_BASIS dimensions these are the eigenvectors of the covariance (`rotation`), A divides by their deviations, and S is
    the identity. Above, a rotation would cost more than it saves: A divides axes by their deviations, and S scales the `leading`
    directions of the largest variance among these axes, and all others alike.
    """

    center: np.ndarray  # [D]
    rotation: np.ndarray | None  # [D, D]
    variances: np.ndarray  # [D], of the rotated features, or of the axes
    leading: tuple[np.ndarray, np.ndarray] | None = None  # variances [k] and orthonormal directions [D, k]

    def scaling(self, l2: float, classes: int):
        """Three functions of [D, C]: w -> kernel, gradient of the kernel -> that of w, kernel -> w."""
        share = (classes - 1) / classes**2  # of a variance: the curvature of the cross-entropy at zero
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


def _eigenbasis(bank, scale, mesh) -> _Directions:
    """The directions of a sample of the rows; an estimate is enough."""
    count, dim = bank.x.shape
    if dim <= LARGEST_BASIS:
        covariance, center, *_ = _sums(bank, np.arange(0, count, max(1, count // max(8192, 4 * dim))), scale, mesh)
        variances, rotation = np.linalg.eigh(covariance)
        return _Directions(center, rotation, variances)
    mean, std = moments(bank.x)
    rows = (bank.x[:: max(1, count // 4096)] - mean) / std
    vectors = np.random.default_rng(0).standard_normal((dim, min(LEADING, dim // 2, len(rows))), np.float32)
    for _ in range(2):  # subspace iteration
        vectors = np.linalg.qr(rows.T @ (rows @ vectors))[0]
    projected = rows @ vectors
    values, inside = np.linalg.eigh((projected.T @ projected / len(rows)).astype(np.float64))
    return _Directions((mean - scale[0]) / scale[1], None, np.square(std / scale[1]), (values, vectors @ inside))


@functools.partial(jax.jit, donate_argnums=0)
def _rotate(x, center, mean, std, basis):
    x = (x - mean) / std - center
    return x if basis is None else jnp.matmul(x, basis, precision=HIGHEST)


@functools.partial(jax.jit, static_argnames="mesh")
def _losses_and_grads(x, y, weight, kernel, bias, *, mesh):
    """(weighted losses [N], gradients). The caller sums the losses in float64: a line search needs that precision."""

    def loss(kernel, bias):
        logits = jnp.matmul(x, kernel, precision=HIGHEST) + bias
        losses = weight * optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.sum(), losses

    grads, losses = jax.grad(loss, (0, 1), has_aux=True)(kernel, bias)
    return jax.lax.with_sharding_constraint((losses, grads), NamedSharding(mesh, replicated))


def _train_ridge(bank, rows, scale, grid, mesh):
    """Solve for all l2 with one eigendecomposition. Returns kernel, bias."""
    covariance, x_mean, cross, target_mean = _sums(bank, rows, scale, mesh)
    eigenvalues, basis = np.linalg.eigh(covariance)
    rotated = basis.T @ cross
    kernels = [basis @ (rotated / (np.maximum(eigenvalues, 0) + l2)[:, None]) for (l2,) in grid]
    return np.stack(kernels, 1), np.stack([target_mean - x_mean @ kernel for kernel in kernels])


def _sums(bank, rows, scale, mesh):
    """Covariance [D, D] and mean [D] of scaled features, their covariance with targets -1, 1 [D, C], target mean [C].

    Sums over a chunk are float32 on the devices; the rest is float64 on the host.
    """
    dim, classes, n = bank.x.shape[1], int(bank.y.max()) + 1, len(rows)
    size = _chunk_rows(dim, n, mesh)
    split = NamedSharding(mesh, rows_first)
    mean, std = replicate_tree(scale, mesh)
    gram, cross, total = np.zeros((dim, dim)), np.zeros((dim, classes)), np.zeros(dim)
    for start, stop in chunks(n, size):
        part = rows[start:stop]
        targets = padded(2 * (bank.y[part][:, None] == np.arange(classes)).astype(np.float32) - 1, size)
        weight = padded(np.ones(stop - start, np.float32), size)
        arrays = (put_global(array, split) for array in (padded(bank.x[part], size), targets, weight))
        sums = jax.device_get(_chunk_sums(*arrays, mean, std, mesh=mesh))
        gram, cross, total = gram + sums[0], cross + sums[1], total + sums[2]
    x_mean, target_mean = total / n, 2 * np.bincount(bank.y[rows], minlength=classes) / n - 1
    return gram / n - np.outer(x_mean, x_mean), x_mean, cross / n - np.outer(x_mean, target_mean), target_mean


@functools.partial(jax.jit, static_argnames="mesh")
def _chunk_sums(x, targets, weight, mean, std, *, mesh):
    x = (x - mean) / std * weight[:, None]
    sums = (jnp.matmul(x.T, x, precision=HIGHEST), jnp.matmul(x.T, targets, precision=HIGHEST), x.sum(0))
    return jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, replicated))


def _chunk_rows(dim, count, mesh):
    rows = max(1, min(CHUNK_BYTES // (4 * dim), count))
    return -(-rows // mesh.size) * mesh.size


def _no_scale(dim):
    return np.zeros(dim, np.float32), np.ones(dim, np.float32)


def solver_options(solver, options):
    """The defaults of the solver, replaced by the options that are not None. Raises UserError for unknown options or values."""
    if solver not in DEFAULTS:
        raise UserError(f"linear probe solver={solver!r} does not exist; choose one of {', '.join(DEFAULTS)}")
    merged = dict(DEFAULTS[solver])
    for name, value in options.items():
        if value is None:
            continue
        if name not in merged:
            raise UserError(f"linear probe solver={solver!r} has no option {name!r}; it has {', '.join(merged)}")
        merged[name] = value
    for name, value in merged.items():
        values = value if isinstance(value, Sequence) else (value,)
        lowest_allowed = 0 if name == "weight_decays" else np.nextafter(0, 1)
        if not values or min(values) < lowest_allowed:
            raise UserError(f"linear probe {name}={value} must be positive and not empty")
    return merged
