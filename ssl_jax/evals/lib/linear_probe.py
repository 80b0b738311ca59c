"""Linear probes of frozen features: a grid of probes is trained at once and the best on held-out training examples is chosen.

Three solvers for one linear map [D, C]:

sgd    cross-entropy, Nesterov momentum .9, cosine to 0, zero init (SimCLR's protocol on cached features); the grid is
       learning rates x weight decays; any bank size, streamed through the device in chunks.
lbfgs  L2-regularized multinomial logistic regression (Kornblith et al. 2019, section 3; see `logistic`): mean cross-entropy
       + l2/2 |W|^2, so that l2 is 1/(C n) of scikit-learn. The bank stays on the devices, split over them.
       It ends when the gradient is small, or after `iterations`; the protocol says so where one of the fits did not converge.
ridge  least squares on targets -1, 1, closed form: mean squared error + l2 |W|^2, so that l2 is alpha/n of
       scikit-learn (see `second_moments`).

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_jax.engine.sharding import put_global
from ssl_jax.errors import UserError
from ssl_jax.evals.context import require_labels
from ssl_jax.evals.lib import logistic, second_moments
from ssl_jax.evals.lib.features import Features, chunks, flat_mesh, hits, moments, padded, replicate_tree
from ssl_jax.evals.lib.logistic import CONVERGED
from ssl_jax.evals.lib.second_moments import CHUNK_BYTES, HIGHEST, chunk_rows

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
        options["within"] = logistic.directions(bank, scale, mesh)
    train = {"sgd": _train_sgd, "lbfgs": logistic.fit, "ridge": second_moments.ridge}[solver]
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


def convergence(*fits) -> str:
    """The part of a protocol about fits that did not converge, of `Fit`s or other records with these fields; '' if all did."""
    unconverged = sum(each.unconverged for each in fits)
    return f" ({unconverged} of {sum(each.fits for each in fits)} fits not converged)" if unconverged else ""


def predict(probe: Probe, x: np.ndarray, mesh: Mesh | None = None) -> np.ndarray:
    """Logits [N, H, C] float32 of x [N, D], in chunks over the devices."""
    mesh = flat_mesh(mesh)
    size = chunk_rows(x.shape[1], len(x), mesh)
    probe = replicate_tree(probe, mesh)
    logits = []
    for start, stop in chunks(len(x), size):
        part = put_global(padded(x[start:stop], size), NamedSharding(mesh, rows_first))
        logits.append(jax.device_get(_logits(probe, part, mesh=mesh))[: stop - start])
    return np.concatenate(logits)


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
