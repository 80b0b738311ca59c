"""Trains a config in a workdir: start or resume, evaluate as the config says, end with a table and a report."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from ssl_jax.data.geometry import check_host_ops, is_random
from ssl_jax.data.pipeline import iterate
from ssl_jax.engine import loop
from ssl_jax.engine.checkpoint import Checkpoints, gather, write_json
from ssl_jax.engine.health import HealthMonitor, spectral_norms
from ssl_jax.engine.method import State
from ssl_jax.engine.metrics import MetricsWriter, record_start
from ssl_jax.engine.pictures import save_grid
from ssl_jax.engine.records import REST, SPAN, goodput, read_metrics, read_starts
from ssl_jax.engine.sharding import BATCH, to_host
from ssl_jax.engine.timing import Trace
from ssl_jax.engine.watchdog import Watchdog
from ssl_jax.errors import NotFinite, UserError
from ssl_jax.evals import run as evals
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import distributed, launch_environment
from ssl_jax.experiment.baselines import BASELINES, add_missing, initial_state
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.contexts import model_context, open_eval
from ssl_jax.experiment.data_record import check_there, record_data
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.neighbors import save_neighbors
from ssl_jax.experiment.overrides import refuse_derived
from ssl_jax.experiment.possible import (
    Possible,
    check_examples,
    check_training_labels,
    checked,
    labels_in_range,
    possible,
)
from ssl_jax.experiment.progress import Progress
from ssl_jax.experiment.provenance import provenance, train_command
from ssl_jax.experiment.record import Experiment
from ssl_jax.experiment.sampler import save_samples
from ssl_jax.experiment.workdir import (
    PATIENCE,
    WorkdirLock,
    begin_again,
    check_same_workdir,
    last_logged,
    lock_workdir,
    note_stop,
    record_config,
)  # fmt: skip
from ssl_jax.rehearsal import flops

log = logging.getLogger(__name__)

SAVE_AGREED = 16  # steps at least between two agreements of several processes on SIGUSR1, each of which waits for all devices


def run_training(
    path_and_variant: str, overrides: Sequence[str], workdir: Path, write_report: Callable[[Path], Path], profile: str = "",
    saved_code: int = 0, start_over: bool = False,
) -> int:
    """Train in this process, which may be one of several; returns the exit code.

    Args:
        write_report: (workdir) -> path of the report.
        profile: 'START:END', steps to trace; '' for none.
        saved_code: the exit code after a SIGTERM that saved.
        start_over: begin at step 0, and move what the workdir holds of a run into `before-N` there.

    Raises:
        UserError: a mistake in the config, the data or the workdir.
        MachineFault: a disk or another host fails.
    """
    began = time.time()
    trace = Trace(workdir / "profile", profile)
    distributed.start_jax()
    config = load_config(path_and_variant, overrides)
    distributed.check_same_config(configs.plain(config))  # before `build_experiment`, whose collectives depend on the mesh
    # An engine may restart a job before its last process has ended.
    with lock_workdir(workdir, PATIENCE if saved_code else 0.0) as lock:
        if start_over:
            begin_again(workdir)
        check_same_workdir(workdir)
        check_there(workdir, config.data.name)
        experiment = build_experiment(config, workdir=workdir)
        distributed.check_same_config(configs.plain(experiment.config))
        record_config(workdir, configs.plain(experiment.config), experiment.durations["total"])
        command = train_command(path_and_variant, overrides, workdir)
        write_json(workdir / "provenance.json", {**provenance(), "command": command, "step_flops": step_flops(experiment)})
        record_data(workdir, experiment.batches.source)
        record_start(workdir, began)
        restarted = launch_environment.launched_process(os.environ) is not None or saved_code != 0
        try:
            with Watchdog(workdir / "processes", jax.process_index(), jax.process_count(), restarted) as watchdog:
                train(experiment, workdir, write_report, trace, watchdog, lock)
        except loop.Interrupted as interrupted:
            print(f"{interrupted}; run the same command again to go on", file=sys.stderr)
            return saved_code if interrupted.signum == signal.SIGTERM else 128 + interrupted.signum
    return 0


def step_flops(experiment: Experiment) -> int:
    """FLOPs of a step on all devices. The trace is not wasted: the first step uses it, too."""
    run, size = experiment.run, experiment.config.batch_size
    rows, shapes = NamedSharding(run.mesh, BATCH), {name: spec.batch(size) for name, spec in experiment.method.inputs.items()}
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in shapes.items()}
    with jax.transfer_guard("disallow"):  # as in the loop: what the cache of traces depends on
        return flops.count(run.trace(run.abstract, batch, run.root).jaxpr).flops


def load_config(path_and_variant: str, overrides):
    """Load a locked config and check what needs neither data nor devices. Raises UserError."""
    refuse_derived(overrides)
    config = configs.load(path_and_variant, overrides)
    unknown = sorted(set(config.baselines) - set(BASELINES))
    if unknown:
        raise UserError(f"config.baselines: {unknown[0]!r} is unknown; choose of {', '.join(map(repr, BASELINES))}")
    if config.warm_start.workdir is None:
        raise UserError(
            "config.warm_start.workdir is not set, and this recipe starts from the weights of another run; give its directory with "
            "--config.warm_start.workdir=DIR, a file of weights with =FILE, or --config.warm_start.workdir= for random weights"
        )
    for key in ("ops", "eval_ops"):
        check_host_ops(config.data[key])
    if is_random(config.data.eval_ops):
        raise UserError(
            f"config.data.eval_ops={config.data.eval_ops!r} crops or flips at random; evaluations need the same pixels every time: "
            "use resize_crop without flip"
        )
    evals.check(config.evals)
    label = config.best_metric.removeprefix("-").partition("/")[0]
    if label and label not in config.evals:
        there = f"there are {', '.join(config.evals)}" if config.evals else "there are none"
        raise UserError(
            f"config.best_metric={config.best_metric!r} is of no evaluation in config.evals ({there}); name one, or give "
            "--config.best_metric= to keep the newest checkpoints only"
        )
    return config


def train(
    experiment: Experiment, workdir: Path, write_report: Callable[[Path], Path], trace: Trace, watchdog: Watchdog, lock: WorkdirLock
) -> None:
    """Start or resume the run in `workdir` and train it to its end. `watchdog` runs during steps only and is paused otherwise."""
    config, run, total = experiment.config, experiment.run, experiment.durations["total"]
    measured = possible(config)
    check_training_labels(experiment)
    check_examples(experiment)
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints, measured.best_metric)
    first = min(experiment.durations.values())
    checkpoints.check_present(last_logged(workdir), least=min(2 * first, total))
    state = checkpoints.restore_latest(run.abstract)
    if state is None:
        state = initial_state(experiment)
    start = int(state.step)
    log.info("%s", loop.describe(workdir, state))
    evaluator = RunEvaluator(experiment, measured, workdir, state)
    if start == 0:
        save_views(experiment, workdir)
        if experiment.sampler:
            save_samples(experiment, state, 0, workdir)
    else:
        log.info("going on at step %d of %d", start, total)

    began = time.perf_counter()
    settings = {
        **configs.plain(config),
        "evaluate_every_steps": experiment.durations["evaluate"],
        "checkpoint_every_steps": experiment.durations["checkpoint"],
    }
    writer, health = MetricsWriter(workdir, start), HealthMonitor()
    for line in read_metrics(workdir):
        health.update(line["step"], line)
    batches = checked(labels_in_range(iterate(experiment.batches, start, total, config.data.workers), experiment), experiment)
    try:
        with loop.Signals(max(config.log_every_steps, SAVE_AGREED)) as signals, Progress(start, total, config.batch_size) as progress:

            def show(step, metrics):
                progress.update(step, metrics)
                health.update(step, metrics)

            missed = evaluator.missed(start)
            if missed is not None:
                with watchdog.paused():
                    scores = evaluator.evaluate(start, state, missed)
                    writer.amend(start, scores)
                    checkpoints.rate(start, scores)
            state = loop.train(
                experiment.method, run, state, batches, total, writer, checkpoints, settings, configs.plain(config),
                experiment.schedules, evaluator.evaluate, show, signals, watchdog, trace, lock.check,
            )  # fmt: skip
    except loop.Interrupted:
        note_stop(workdir, None)
        raise
    except NotFinite as error:
        note_stop(workdir, str(error))
        distributed.abort(error)
        raise
    except Exception as error:  # of any kind, and before `finally`: closing would wait for the other processes
        distributed.abort(error)
        raise
    finally:
        with watchdog.paused():
            trace.close()
            writer.close()
            checkpoints.close()
        if experiment.batches.skipped:
            log.warning("%d examples could not be read and were replaced (named above)", len(experiment.batches.skipped))
    note_stop(workdir, None)
    share = goodput(read_metrics(workdir), read_starts(workdir))
    note = "" if share is None else f"; goodput {100 * share:.0f} % {SPAN}; the rest went into {REST}"
    log.info("%d steps in %.0f s%s", total - start, time.perf_counter() - began, note)
    with watchdog.paused():
        evaluator.save_neighbors()
        if distributed.is_lead():
            report = write_report(workdir)  # before the table: stdout may be closed
            evaluator.evaluations.show(config)
            log.info("report: %s", report)


class RunEvaluator:
    """Evaluates the run while it trains, and its baselines behind the first evaluation, so that training starts at once.

    The features of the newest state stay in `context`, for the pictures at the end of the run.
    """

    def __init__(self, experiment: Experiment, measured: Possible, workdir: Path, state: State):
        """Raises UserError where the method does not offer what an evaluation needs."""
        start = int(state.step)
        self.experiment, self.workdir, self.best = experiment, workdir, measured.best_metric.removeprefix("-")
        self.evaluations = Evaluations(workdir, measured.evals, start)
        self.context = model_context(experiment, state)
        evals.check_needs(measured.evals, self.context)
        self.baselines_complete = False

    def missed(self, start: int) -> list[str] | None:
        """Labels of the evaluations that step `start` still lacks; None where nothing is to be done.

        SIGTERM may have come in a step that was to be evaluated, or the config may have new evaluations.
        """
        durations = self.experiment.durations
        due = start > 0 and (start % durations["evaluate"] == 0 or start == durations["total"])
        new = any(gather(due and not self.evaluations.at("trained", start)))
        labels = self.evaluations.unmeasured("trained", start) if due else []
        return labels if new or labels else None

    def evaluate(self, step: int, state: State, labels: Sequence[str] | None = None) -> dict[str, float]:
        """Run the evaluations `labels` (None: all) on `state`.

        Returns:
            {name: value}: the scores of that step, and the spectral norms of a generative method.
        """
        experiment, config = self.experiment, self.experiment.config
        self.context = model_context(experiment, state)
        scores = self.evaluations.add("trained", step, self.context, labels)
        if not self.baselines_complete:
            add_missing(experiment, self.evaluations, config.baselines)
            self.baselines_complete = True
        if self.best and self.best not in scores:
            message = "config.best_metric: %r is not measured, so that no checkpoint is the best one; there are %s"
            log.warning(message, self.best, ", ".join(scores))
        if experiment.sampler is None:
            return scores
        save_samples(experiment, state, step, self.workdir)
        norms = to_host(spectral_norms(state.params), experiment.run.mesh)
        return {**scores, **{name: float(x) for name, x in norms.items()}}

    def save_neighbors(self) -> None:
        """Write `pictures/neighbors.png` from the features of the last evaluation; nothing for a run without evaluations."""
        if self.evaluations.spec:
            whole = functools.partial(open_eval, self.experiment.config)
            save_neighbors(self.context, whole, self.workdir / "pictures" / "neighbors.png")


def save_views(experiment: Experiment, workdir: Path) -> None:
    """Write `pictures/views.png`: a column per image, with the views that the first phase gets in step 0 below it."""
    if experiment.method.views is None:
        return
    batch = experiment.batches[0]
    images = batch["image"][:8]
    key = jax.random.key(experiment.config.seed)
    for _ in ("step", "phase", "part"):  # as `engine.step` does; the method may fold in more
        key = jax.random.fold_in(key, 0)
    views = jax.jit(experiment.method.views)(images, key)
    rows = [np.asarray(group) for group in (views.values() if isinstance(views, Mapping) else (views,))]
    originals = images if images.ndim == 4 else images[:, 0]
    if any(originals.shape[1:] == group.shape[2:] for group in rows):
        rows.insert(0, originals[:, None] / 255)
    height, width = (max(group.shape[axis] for group in rows) for axis in (2, 3))  # smaller views on white
    fill = [((0, 0), (0, 0), (0, height - group.shape[2]), (0, width - group.shape[3]), (0, 0)) for group in rows]
    padded = [np.pad(group, each, constant_values=1) for group, each in zip(rows, fill, strict=True)]
    save_grid(np.concatenate(padded, 1).swapaxes(0, 1), workdir / "pictures" / "views.png")
