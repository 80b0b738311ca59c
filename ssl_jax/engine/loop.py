"""The training loop: batches, metrics (fetched one step late), checkpoints and evaluations. It knows no method by name."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from ssl_jax.engine import sharding
from ssl_jax.engine.checkpoint import Checkpoints, gather
from ssl_jax.engine.method import Batch, Method, State, trained
from ssl_jax.engine.metrics import MetricsWriter
from ssl_jax.engine.step import check_groups, make_step
from ssl_jax.engine.timing import Clock, Trace
from ssl_jax.engine.watchdog import Watchdog
from ssl_jax.errors import NotFinite

log = logging.getLogger(__name__)


class CompiledRun(NamedTuple):
    """The jitted functions of a run, and what else stays the same from step to step."""

    mesh: Mesh
    abstract: State  # shapes with shardings, the target of a restore; `frozen` already holds its arrays
    init: Callable[[], State]  # creates the sharded initial state
    step: Callable[[State, Batch, jax.Array], tuple[State, Mapping]]  # donates the state except `frozen`
    trace: Callable  # (state, batch, root) -> jax.stages.Traced of the step; shapes suffice as arguments
    traces: Callable[[], int]  # how often the step has been traced
    root: jax.Array  # the random key that all others are folded from


class Interrupted(Exception):
    """SIGTERM, SIGINT or SIGHUP arrived; the state has been saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name} at step {step}: saved")
        self.signum, self.step = signum, step


def compile_run(
    method: Method,
    make_optimizers: Callable[[Mapping], tuple[Mapping, Mapping]],
    mesh: Mesh,
    rules,
    seed: int,
    example: Batch,
    frozen: Mapping | None = None,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    xla: Mapping[str, bool] | None = None,
    abstract: bool = False,
) -> tuple[CompiledRun, Mapping]:
    """Shapes -> optimizers -> shardings -> jitted init and step. Creates no array of the state.

    Args:
        make_optimizers: shapes of the params -> ({group: transformation}, {group: schedule}).
        rules: (regex, rule) list for the parameters (`engine.sharding`).
        example: a host batch, for its shapes.
        frozen: {stage: {'params': ..., 'mutable': ...}}, arrays of the host, or shapes if `abstract`.
        xla: compiler options for the step (`engine.xla_options`).
        abstract: nothing will run; the devices of the mesh may be descriptions, and `root` is a shape.

    Returns:
        (the run, {group: learning-rate schedule})
    """
    frozen = dict(frozen or {})
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in example.items()}
    zeros = {name: np.zeros(x.shape, x.dtype) for name, x in example.items()}
    params, _ = jax.eval_shape(method.init, jax.random.key(0), shapes, frozen)
    optimizers, schedules = make_optimizers(params)
    check_groups(method, params, optimizers)
    whole_step = make_step(method, optimizers, accumulate, skip_nonfinite, unroll=mesh.devices.flat[0].platform == "cpu")

    def init(key, batch, frozen) -> State:
        params, mutable = method.init(key, batch, frozen)
        opt = {group: optimizers[group].init(params[group]) for group in params}
        return State(np.zeros((), np.int32), params, opt, mutable, {})

    def step(state, frozen, batch, root):
        after, metrics = whole_step(state._replace(frozen=frozen), batch, root)
        return after._replace(frozen={}), metrics

    root = jax.eval_shape(jax.random.key, seed) if abstract else jax.random.key(seed)
    replicated = NamedSharding(mesh, sharding.P())
    state_shapes = jax.eval_shape(init, root, shapes, frozen)
    state_shardings = sharding.shard_state(rules, state_shapes, mesh)
    batch_shardings = {name: NamedSharding(mesh, sharding.BATCH) for name in example}
    frozen = jax.tree.map(lambda x: _put(x, replicated), frozen)

    jitted_init = jax.jit(init, out_shardings=state_shardings)
    jitted_step = jax.jit(
        step,
        in_shardings=(state_shardings, replicated, batch_shardings, replicated),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
        compiler_options=dict(xla or {}),
    )

    # The frozen arrays are a separate argument, so that they are neither donated nor copied.
    def run_step(state, batch, root):
        with jax.set_mesh(mesh):  # models constrain activations to the ambient mesh
            after, metrics = jitted_step(state._replace(frozen={}), state.frozen, batch, root)
        return after._replace(frozen=state.frozen), metrics

    def trace_step(state, batch, root):
        with jax.set_mesh(mesh):
            return jitted_step.trace(state._replace(frozen={}), state.frozen, batch, root)

    def run_init():
        with jax.set_mesh(mesh):
            return jitted_init(root, zeros, frozen)._replace(frozen=frozen)

    run = CompiledRun(
        mesh=mesh,
        abstract=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state_shapes, state_shardings
        )._replace(frozen=frozen),
        init=run_init,
        step=run_step,
        trace=trace_step,
        traces=jitted_step._cache_size,
        root=_put(root, replicated) if abstract else jax.jit(lambda: jax.random.key(seed), out_shardings=replicated)(),
    )
    return run, schedules


def _put(x, where: NamedSharding):
    """A host array on the devices, or a shape with the sharding `where`."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return sharding.put_global(np.asarray(x), where)


def to_device(batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, ahead: int = 2) -> Iterator[Batch]:
    """The batches of this process as global arrays, with `ahead` transfers in flight."""
    queue: list[Batch] = []
    for batch in batches:
        queue.append({k: sharding.from_local_rows(x, mesh) for k, x in batch.items()})
        if len(queue) >= ahead:
            yield queue.pop(0)
    yield from queue


class Signals:
    """Remembers the first SIGTERM, SIGINT or SIGHUP, after which the run saves and ends; a second SIGINT raises KeyboardInterrupt.

    SIGUSR1 makes the run save and go on. A signal that was ignored at the start, such as SIGHUP under nohup, stays ignored.

    With several processes JAX's coordinator handles a SIGTERM to any of them, and picks a step that none has passed yet. Its count
    must begin at the start of these processes, or it would miss a SIGTERM that arrives before the first step. SIGHUP is passed on to
    it, and processes agree on SIGUSR1 every `every` steps, for which they wait for each other.
    """

    def __init__(self, every: int = 1):
        self.every = every

    def __enter__(self):
        self.received: int | None = None
        self._save = False
        self._start: int | None = None
        alone = jax.process_count() == 1
        ending = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if alone else (signal.SIGHUP,)
        handled = dict.fromkeys(ending, self._end if alone else self._pass_on) | {signal.SIGUSR1: self._ask}
        heeded = {s: handler for s, handler in handled.items() if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN}
        self._before = {s: signal.signal(s, handler) for s, handler in heeded.items()}
        return self

    def stop(self, step: int) -> int | None:
        """The signal that makes `step` the last one, or None. Every process must call it once in every step."""
        self._start = step - 1 if self._start is None else self._start
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step - self._start):
            self.received = signal.SIGTERM
        return self.received

    def save(self, step: int) -> bool:
        """Whether SIGUSR1 asks for a checkpoint of `step`. Every process must call it once in every step."""
        if jax.process_count() > 1 and step % self.every:
            return False
        asked = any(gather(self._save))
        self._save = self._save and not asked
        return asked

    def _end(self, signum, _frame):
        if self.received == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    def _pass_on(self, _signum, _frame):
        os.kill(os.getpid(), signal.SIGTERM)

    def _ask(self, _signum, _frame):
        self._save = True

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def check_finite(method: Method, step: int, metrics: Mapping[str, float], optim: Mapping[str, Mapping] = {}) -> None:
    """Raises NotFinite, with step, phase and group, if `metrics` has a loss or gradient norm that is not finite.

    `optim`: config.optim, for the flags that lower the learning rates.
    """
    for phase in method.phases:
        for name in ("loss", *(f"grad_norm/{group}" for group in trained(phase))):
            value = metrics.get(f"{phase.name}/{name}", 0.0)
            if not math.isfinite(value):
                where = f"gradient of group {name.split('/')[1]!r}" if "/" in name else "loss"
                rates = {group: optim[group]["lr"] for group in trained(phase) if group in optim}
                lower = " ".join(f"--config.optim.{group}.lr={rate / 10:g}" for group, rate in rates.items())
                raise NotFinite(
                    f"step {step}: the {where} in phase {phase.name!r} (groups {', '.join(trained(phase))}) is {value}; the last "
                    f"checkpoint is kept. Run the same command with {lower or 'a lower learning rate'}, or with "
                    "--config.on_nonfinite=skip"
                )


def train(
    method: Method,
    run: CompiledRun,
    state: State,
    batches: Iterable[Mapping[str, np.ndarray]],
    total: int,
    writer: MetricsWriter,
    checkpoints: Checkpoints,
    settings: Mapping,
    config: Mapping,
    schedules: Mapping[str, Callable],
    evaluate: Callable[[int, State], Mapping[str, float]],
    progress: Callable[[int, Mapping[str, float]], None],
    watch: Signals,
    watchdog: Watchdog,
    trace: Trace,
    check_workdir: Callable[[], None] = lambda: None,
) -> State:
    """Train `state` to step `total`.

    `settings` has `batch_size`, `log_every_steps`, `checkpoint_every_steps`, `evaluate_every_steps`, `optim` and
    `on_nonfinite`. `config` is stored in checkpoints. `evaluate(step, state)` returns metrics to log; `progress(step, metrics)`
    shows them. `check_workdir()` raises where the workdir is no longer there. The metrics of a step are fetched while the next one
    runs, so that the devices never idle. A step is logged, then saved, then evaluated.

    Raises:
        Interrupted: after a signal; the state has been saved.
        NotFinite: a loss or the state is not finite.
        MachineFault: a checkpoint or a metric cannot be written, or the workdir has gone.
    """
    start = int(state.step)
    waiting: list[tuple[int, Mapping]] = []
    clock = Clock(start, settings["batch_size"])

    def fetch(step: int, metrics: Mapping) -> dict[str, float]:
        """Fetch and check the metrics of a step, without those of phases that did not run."""
        with clock.waiting("device"):
            values = {name: float(x) for name, x in jax.device_get(dict(metrics)).items()}
        idle = [p.name for p in method.phases if p.when is not None and not bool(p.when(np.int32(step - 1)))]
        values = {name: x for name, x in values.items() if name.split("/")[0] not in idle}
        if settings["on_nonfinite"] == "stop":
            check_finite(method, step, values, settings["optim"])
        return values

    def report(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        rates = {f"lr/{group}": float(rate(step - 1)) for group, rate in schedules.items()}
        times = clock.split(step)
        watchdog.record_input_wait(times["time/input_wait"], clock.spent)
        line = {**metrics, **rates, **times, **watchdog.slowest_input()}
        writer.write(step, line)
        return line

    source = to_device(batches, run.mesh)
    for step in range(start + 1, total + 1):
        watchdog.beat(step)
        check_workdir()
        clock.begin_step()
        trace.before(step, state)
        with clock.waiting("input"):
            batch = next(source)
        with jax.profiler.StepTraceAnnotation("step", step_num=step), jax.transfer_guard("disallow"):
            state, metrics = run.step(state, batch, run.root)
        if step == trace.last:  # writing the trace may take minutes
            with clock.paused(), watchdog.paused():
                trace.after(step, state)
        waiting.append((step, metrics))
        stop = watch.stop(step) is not None
        due = step % settings["evaluate_every_steps"] == 0 or step == total
        asked = watch.save(step)
        save = due or stop or asked or step % settings["checkpoint_every_steps"] == 0
        while len(waiting) > (0 if save else 1):
            done, metrics = waiting.pop(0)
            values, measured = fetch(done, metrics), done == step and due and not stop
            if measured or done == total or done % settings["log_every_steps"] == 0:
                line = report(done, values)
                if not measured:
                    progress(done, line)
        if save:
            check_workdir()
            with clock.paused(), watchdog.paused():
                checkpoints.save(state, config)
                if asked:
                    checkpoints.wait()
                    log.info("SIGUSR1: saved step %d", step)
        if stop:
            with watchdog.paused():
                checkpoints.wait()
            raise Interrupted(watch.received, step)
        if due:  # after the save: an evaluation that fails must not cost the steps before it
            with clock.paused(), watchdog.paused():
                checkpoints.wait()
                scores = evaluate(step, state)
                writer.amend(step, scores)
                checkpoints.rate(step, scores)
            progress(step, {**line, **scores})
    with watchdog.paused():
        checkpoints.wait()
    return state


def describe(workdir: Path, state: State) -> str:
    """'<workdir>: 11,173,056 parameters in 'net'', for the log."""
    sizes = {group: sum(x.size for x in jax.tree.leaves(tree)) for group, tree in state.params.items()}
    return f"{workdir}: " + ", ".join(f"{size:,} parameters in {group!r}" for group, size in sizes.items())
