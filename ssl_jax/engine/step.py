"""The one train step: run the phases of a method in order, then its teachers, then the clock."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from ssl_jax.engine.method import Batch, Method, Metrics, Phase, State, groups, loss_groups, trained
from ssl_jax.errors import UserError


def split(batch: Batch, n: int) -> Batch:
    """`batch` as `n` interleaved parts: every array of [B, ...] as [n, B / n, ...], each part still spread over every device.

    `reshape(B // n, n, ...)` compiles to no collective; the reverse order of axes costs three.
    """
    return {k: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}


def check_groups(method: Method, params: Mapping, optimizers: Mapping) -> None:
    """The groups named by phases, returned by init and given optimizers must be the same set.

    Raises:
        UserError: if they are not, naming the three sets.
    """
    named = {"phases": groups(method), "init": set(params), "config.optim": set(optimizers)}
    if len({frozenset(names) for names in named.values()}) > 1:
        told = ", ".join(f"{where} {sorted(names)}" for where, names in named.items())
        raise UserError(f"parameter groups differ: {told}; give every group one optimizer in config.optim")


def differentiate(phase: Phase, *args):
    """({'loss': ...}, aux, gradients) of `phase.loss(*args)` with respect to its first argument.

    With several players there is one forward pass, and one backward pass for each player, of which its own groups are kept;
    'loss' is the sum, and 'loss/<groups>' that of each player.
    """
    if len(loss_groups(phase)) == 1:
        (loss, aux), grads = jax.value_and_grad(phase.loss, has_aux=True)(*args)
        return {"loss": loss}, aux, grads
    train, *others = args
    losses, backward, aux = jax.vjp(lambda train: phase.loss(train, *others), train, has_aux=True)
    grads, told = {}, {}
    for i, player in enumerate(loss_groups(phase)):
        (mine,) = backward(tuple(jnp.ones_like(loss) if i == j else jnp.zeros_like(loss) for j, loss in enumerate(losses)))
        grads |= {group: mine[group] for group in player}
        told[f"loss/{'+'.join(player)}"] = losses[i]
    return {"loss": sum(losses), **told}, aux, grads


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
        skip_nonfinite: leave the state as it was where a loss or gradient is not finite (counted in `<phase>/skipped`).
        unroll: write the sub-steps of a phase and the parts of a batch out, one behind the other, instead of looping over them. The
            program is as many times larger, and longer compiled; but XLA's loops on CPUs are slow (WGAN-GP's step by half).

    Metrics are float32 scalars: what the phases report, prefixed with the phase's name, with `loss` and a gradient norm for
    each group; of a phase's sub-steps the last one's, and of `skipped` the count. In a step in which `phase.when` is false its
    metrics are NaN (no value), which the writer leaves out.

    Raises:
        UserError: `accumulate` > 1 for a method whose loss mixes the examples of a batch.
    """
    if accumulate > 1 and method.couples_batch:
        raise UserError(
            "config.accumulate > 1, but this method's loss mixes the examples of a batch (its gradient would be another one); "
            "set config.accumulate=1 and use more devices or config.model.encoder.remat"
        )

    def each(body, carry, batch: Batch, n: int):
        """`body(carry, (i, part i)) -> (carry, _)` for the n parts of a batch in turn."""
        return jax.lax.scan(body, carry, (jnp.arange(n), split(batch, n)), unroll=n if unroll else 1)

    def gradient(phase: Phase, state: State, batch: Batch, key: jax.Array):
        train = {group: state.params[group] for group in trained(phase)}

        def of(mutable, batch, key):
            losses, (update, logs), grads = differentiate(phase, train, state._replace(mutable=mutable), batch, key)
            unknown = set(update) - set(mutable)
            assert not unknown, f"phase {phase.name!r} writes mutable {sorted(unknown)} that init did not create"
            return {**mutable, **update}, (grads, {**logs, **losses})

        def add(carry, given):
            (mutable, total), (i, part) = carry, given
            mutable, this = of(mutable, part, jax.random.fold_in(key, i))
            return (mutable, jax.tree.map(jnp.add, total, this)), None

        if accumulate == 1:
            mutable, (grads, logs) = of(state.mutable, batch, key)
            return grads, mutable, logs
        part = {name: x[: x.shape[0] // accumulate] for name, x in batch.items()}
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(of, state.mutable, part, key)[1])
        (mutable, total), _ = each(add, (state.mutable, nothing), batch, accumulate)
        grads, logs = jax.tree.map(lambda x: x / accumulate, total)
        return grads, mutable, logs

    def run_phase(phase: Phase, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        grads, mutable, logs = gradient(phase, state, batch, key)
        norms = {f"grad_norm/{group}": optax.global_norm(grads[group]) for group in trained(phase)}
        params, opt = dict(state.params), dict(state.opt)
        for group in trained(phase):
            updates, opt[group] = optimizers[group].update(grads[group], opt[group], params[group], step=state.step)
            params[group] = optax.apply_updates(params[group], updates)
        new = state._replace(params=params, opt=opt, mutable=mutable)
        if skip_nonfinite:
            finite = jnp.isfinite(logs["loss"]) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
            logs = {**logs, "skipped": 1.0 - finite}
        metrics = {f"{phase.name}/{name}": jnp.asarray(x, jnp.float32) for name, x in {**logs, **norms}.items()}
        return new, metrics

    def sub_step(phase: Phase, key: jax.Array, state: State, given: tuple[int, Batch]) -> tuple[State, Metrics]:
        r, part = given

        def run(state):
            return run_phase(phase, state, part, jax.random.fold_in(key, r))

        def idle(state):
            return state, jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(run, state)[1])

        return run(state) if phase.when is None else jax.lax.cond(phase.when(state.step), run, idle, state)

    def step(state: State, batch: Batch, root: jax.Array) -> tuple[State, Metrics]:
        key, metrics = jax.random.fold_in(root, state.step), {}
        for i, phase in enumerate(method.phases):
            this = functools.partial(sub_step, phase, jax.random.fold_in(key, i))
            if phase.repeat == 1:
                state, told = this(state, (0, batch))
            else:
                state, told = each(this, state, batch, phase.repeat)
                told = {name: jnp.sum(x) if name.endswith("/skipped") else x[-1] for name, x in told.items()}
            metrics |= told
        state = state._replace(mutable=method.after(state))
        return state._replace(step=state.step + 1), metrics

    return step
