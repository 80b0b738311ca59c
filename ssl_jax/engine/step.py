"""The train step of every method: run the phases in order, then `Method.after`, then increment the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssl_jax.engine.method import FEATURES, Batch, Method, Metrics, Phase, State, groups, loss_groups, trained
from ssl_jax.errors import UserError


def split(batch: Batch, n: int) -> Batch:
    """`batch` as `n` interleaved parts: every array [B, ...] becomes [n, B / n, ...], and each part stays sharded over all devices.

    `reshape(B // n, n, ...)` compiles without a collective; reshaping to (n, B // n, ...) would need three.
    """
    return {k: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}


def check_groups(method: Method, params: Mapping, optimizers: Mapping) -> None:
    """Check that the phases, `Method.init` and config.optim have the same parameter groups.

    Raises:
        UserError: they differ; the message lists all three sets.
    """
    named = {"phases": groups(method), "init": set(params), "config.optim": set(optimizers)}
    if len({frozenset(names) for names in named.values()}) > 1:
        listed = ", ".join(f"{where} {sorted(names)}" for where, names in named.items())
        raise UserError(f"parameter groups differ: {listed}; give every group one optimizer in config.optim")


class StepOptions(NamedTuple):
    """The arguments of `make_step` that all phases share; see there."""

    optimizers: Mapping[str, optax.GradientTransformation]
    accumulate: int
    skip_nonfinite: bool
    unroll: bool


def loss_and_grads(phase: Phase, train: dict, state: State, batch: Batch, key: jax.Array):
    """One forward and backward pass of `phase` with respect to `train`, {group: parameters}.

    Returns:
        ({'loss': scalar, ...}, mutable with the updates of the loss, metrics of the loss, {group: gradients}).

    With several loss groups there is one forward pass and one backward pass per loss. A parameter group gets the gradient of its
    own loss. 'loss' is then the sum, and 'loss/<groups>' are its terms.
    """
    if len(loss_groups(phase)) == 1:
        (loss, (update, metrics)), grads = jax.value_and_grad(phase.loss, has_aux=True)(train, state, batch, key)
        losses = {"loss": loss}
    else:
        parts, backward, (update, metrics) = jax.vjp(lambda train: phase.loss(train, state, batch, key), train, has_aux=True)
        grads, losses = {}, {"loss": sum(parts)}
        for i, groups_of_loss in enumerate(loss_groups(phase)):
            (of_loss,) = backward(tuple(jnp.ones_like(part) if i == j else jnp.zeros_like(part) for j, part in enumerate(parts)))
            grads |= {group: of_loss[group] for group in groups_of_loss}
            losses[f"loss/{'+'.join(groups_of_loss)}"] = parts[i]
    unknown = set(update) - set(state.mutable)
    assert not unknown, f"phase {phase.name!r} writes mutable {sorted(unknown)} that init did not create"
    metrics = {name: x for name, x in metrics.items() if name != FEATURES}
    return losses, {**state.mutable, **update}, metrics, grads


def scan_parts(body: Callable, carry, batch: Batch, n: int, unroll: bool):
    """Scan `body(carry, (i, part i)) -> (carry, output)` over the n interleaved parts of a batch."""
    return jax.lax.scan(body, carry, (jnp.arange(n), split(batch, n)), unroll=n if unroll else 1)


def accumulate(phase: Phase, train: dict, state: State, batch: Batch, key: jax.Array, n: int, unroll: bool):
    """`loss_and_grads` averaged over n parts of the batch; every part updates the mutable collections."""

    def one(mutable, part, key):
        losses, mutable, metrics, grads = loss_and_grads(phase, train, state._replace(mutable=mutable), part, key)
        return mutable, (grads, losses, metrics)

    def add(carry, numbered_part):
        (mutable, total), (i, part) = carry, numbered_part
        mutable, outputs = one(mutable, part, jax.random.fold_in(key, i))
        return (mutable, jax.tree.map(jnp.add, total, outputs)), None

    first = {name: x[: x.shape[0] // n] for name, x in batch.items()}
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, state.mutable, first, key)[1])
    (mutable, total), _ = scan_parts(add, (state.mutable, zeros), batch, n, unroll)
    grads, losses, metrics = jax.tree.map(lambda x: x / n, total)
    return losses, mutable, metrics, grads


def run_phase(phase: Phase, state: State, batch: Batch, key: jax.Array, options: StepOptions) -> tuple[State, Metrics]:
    """Differentiate the loss of `phase` and update the groups that it trains."""
    train = {group: state.params[group] for group in trained(phase)}
    if options.accumulate == 1:
        losses, mutable, metrics, grads = loss_and_grads(phase, train, state, batch, key)
    else:
        losses, mutable, metrics, grads = accumulate(phase, train, state, batch, key, options.accumulate, options.unroll)
    metrics = {**metrics, **losses}
    norms = {f"grad_norm/{group}": optax.global_norm(grads[group]) for group in trained(phase)}
    params, opt = dict(state.params), dict(state.opt)
    for group in trained(phase):
        updates, opt[group] = options.optimizers[group].update(grads[group], opt[group], params[group], step=state.step)
        params[group] = optax.apply_updates(params[group], updates)
    new = state._replace(params=params, opt=opt, mutable=mutable)
    if options.skip_nonfinite:
        finite = jnp.isfinite(metrics["loss"]) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = {**metrics, "skipped": 1.0 - finite}
    return new, {f"{phase.name}/{name}": jnp.asarray(x, jnp.float32) for name, x in {**metrics, **norms}.items()}


def run_conditional_phase(phase: Phase, state: State, batch: Batch, key: jax.Array, options: StepOptions) -> tuple[State, Metrics]:
    """`run_phase` where `phase.when` is true. Elsewhere the state is unchanged and the metrics are NaN."""

    def run(state):
        return run_phase(phase, state, batch, key, options)

    def idle(state):
        return state, jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(run, state)[1])

    return jax.lax.cond(phase.when(state.step), run, idle, state)


def make_step(
    method: Method,
    optimizers: Mapping[str, optax.GradientTransformation],
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    unroll: bool = False,
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """`step(state, batch, root) -> (state, metrics)`, a pure function to be jitted with shardings.

    Args:
        method: what to train.
        optimizers: one optax transformation per parameter group.
        accumulate: average the gradient over this many parts of the batch before each update.
        skip_nonfinite: keep the old state if a loss or gradient is not finite (counted in `<phase>/skipped`).
        unroll: unroll the loops over sub-steps and over parts of a batch. Compiling takes longer, but convolutions inside XLA's
            loops are slow on CPUs: unrolled, a step of WGAN-GP takes two thirds of the time.

    Metrics are float32 scalars, prefixed with the phase's name: those that its loss returns, `loss`, and a gradient norm per group.
    A phase with sub-steps reports the last one; its `skipped` is the sum. A phase that `when` disables in a step reports NaN.

    Raises:
        UserError: `accumulate` > 1 for a method whose loss mixes the examples of a batch.
    """
    if accumulate > 1 and method.couples_batch:
        raise UserError(
            "config.accumulate > 1, but this method's loss mixes the examples of a batch, so that the gradient would change; "
            "set config.accumulate=1 and use more devices or config.model.encoder.remat"
        )
    options = StepOptions(optimizers, accumulate, skip_nonfinite, unroll)

    def step(state: State, batch: Batch, root: jax.Array) -> tuple[State, Metrics]:
        step_key, metrics = jax.random.fold_in(root, state.step), {}
        for i, phase in enumerate(method.phases):
            phase_key = jax.random.fold_in(step_key, i)
            if phase.repeat > 1:
                state, outputs = run_sub_steps(phase, state, batch, phase_key, options)
            else:
                run = run_phase if phase.when is None else run_conditional_phase
                state, outputs = run(phase, state, batch, jax.random.fold_in(phase_key, 0), options)
            metrics |= outputs
        state = state._replace(mutable=method.after(state))
        return state._replace(step=state.step + 1), metrics

    return step


def run_sub_steps(phase: Phase, state: State, batch: Batch, key: jax.Array, options: StepOptions) -> tuple[State, Metrics]:
    """`phase.repeat` sub-steps, each on its own part of the batch."""

    run = run_phase if phase.when is None else run_conditional_phase

    def sub_step(state, numbered_part):
        r, part = numbered_part
        return run(phase, state, part, jax.random.fold_in(key, r), options)

    state, outputs = scan_parts(sub_step, state, batch, phase.repeat, options.unroll)
    return state, {name: jnp.sum(x) if name.endswith("/skipped") else x[-1] for name, x in outputs.items()}
