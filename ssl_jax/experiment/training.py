"""Trains a config in a workdir: start or go on, evaluate as the config says, end with a table and a report."""

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

from ssl_jax.data.pipeline import iterate
from ssl_jax.engine import loop
from ssl_jax.engine.checkpoint import Checkpoints, gather, write_json
from ssl_jax.engine.health import HealthMonitor, spectral_norms
from ssl_jax.engine.metrics import MetricsWriter, record_start
from ssl_jax.engine.pictures import save_grid
from ssl_jax.engine.records import REST, SPAN, goodput, read_metrics, read_starts
from ssl_jax.engine.sharding import to_host
from ssl_jax.engine.timing import Trace
from ssl_jax.engine.watchdog import Watchdog
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import distributed, launch_environment
from ssl_jax.experiment.baselines import BASELINES, add_missing, baseline_context, initial_state, unmeasurable
from ssl_jax.experiment.build import Experiment, any_context, build_experiment, open_eval, provenance, start_jax
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.neighbors import save_neighbors
from ssl_jax.experiment.progress import Progress
from ssl_jax.experiment.sampler import save_samples
from ssl_jax.experiment.workdir import PATIENCE, check_same_workdir, lock_workdir, record_config

log = logging.getLogger(__name__)


def run(
    path_and_variant: str, overrides: Sequence[str], workdir: Path, write_report: Callable[[Path], Path], profile: str = "",
    saved_code: int = 0,
) -> int:
    """Train in this process, which may be one of several; the exit code, which is `saved_code` after a SIGTERM that saved.

    Raises:
        UserError: for what is wrong with the config, the data or the workdir.
        MachineFault: a disk or another host fails.
    """
    began = time.time()
    trace = Trace(workdir / "profile", profile)
    start_jax()
    config = load(path_and_variant, overrides)
    distributed.check_same_config(configs.plain(config))  # first of all, as what `assemble` does together depends on the mesh
    with lock_workdir(workdir, PATIENCE if saved_code else 0.0):  # an engine may be faster than the end of the start before
        check_same_workdir(workdir)
        this = build_experiment(config, workdir=workdir)
        distributed.check_same_config(configs.plain(this.config))
        record_config(workdir, configs.plain(this.config))
        write_json(workdir / "provenance.json", provenance())
        record_start(workdir, began)
        restarted = launch_environment.launched_process(os.environ) is not None or saved_code != 0
        try:
            with Watchdog(workdir / "processes", jax.process_index(), jax.process_count(), restarted) as watchdog:
                train(this, workdir, write_report, trace, watchdog)
        except loop.Interrupted as interrupted:
            print(f"{interrupted}; run the same command again to go on", file=sys.stderr)
            return saved_code if interrupted.signum == signal.SIGTERM else 128 + interrupted.signum
    return 0


def load(path_and_variant: str, overrides):
    """The locked config, as far as it can be checked without data and devices. Raises UserError."""
    config = configs.load(path_and_variant, overrides)
    unknown = sorted(set(config.baselines) - set(BASELINES))
    if unknown:
        raise UserError(f"config.baselines: {unknown[0]!r} is unknown; choose of {', '.join(map(repr, BASELINES))}")
    if config.warm_start.workdir is None:
        raise UserError(
            "config.warm_start.workdir is not set: this recipe begins with the weights of another run; give its directory with "
            "--config.warm_start.workdir=DIR, or say --config.warm_start.workdir= to begin with random ones"
        )
    evals.check(config.evals)
    label = config.best_metric.removeprefix("-").partition("/")[0]
    if label and label not in config.evals:
        there = f"there are {', '.join(config.evals)}" if config.evals else "there are none"
        raise UserError(
            f"config.best_metric={config.best_metric!r} is of no evaluation in config.evals ({there}); name one, or say "
            "--config.best_metric= to keep the last checkpoints only"
        )
    return config


def train(this: Experiment, workdir: Path, write_report: Callable[[Path], Path], trace: Trace, watchdog: Watchdog) -> None:
    """Start or go on; evaluate as the config says; end with a table and a report. `watchdog` is paused but in steps."""
    config, run, total = this.config, this.run, this.durations["total"]
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.best_metric)
    state = checkpoints.restore_latest(run.abstract)
    if state is None:
        state = initial_state(this)
    start = int(state.step)
    log.info("%s", loop.describe(workdir, state))
    left_out = unmeasurable(config, config.evals)
    for label, reason in left_out.items():
        log.warning("evals.%s is left out: %s", label, reason)
    evaluations = Evaluations(workdir, {label: entry for label, entry in config.evals.items() if label not in left_out}, start)
    last = any_context(this, state)
    evals.check_needs(evaluations.spec, last)
    if start == 0:
        save_views(this, workdir)
        if this.sampler:
            save_samples(this, state, 0, workdir)
        for name in config.baselines:
            with watchdog.paused():
                evaluations.add(name, 0, any_context(this, state) if name == "untrained" else baseline_context(this, name))
    else:
        log.info("going on at step %d of %d", start, total)
    complete = start == 0  # else evaluations may have been added since

    def evaluate(step, state, labels=None):
        nonlocal last, complete
        last = any_context(this, state)
        scores = evaluations.add("trained", step, last, labels)
        if not complete:
            add_missing(this, evaluations, config.baselines)
            complete = True
        best = config.best_metric.removeprefix("-")
        if best and best not in scores:
            told = ", ".join(scores)
            log.warning("config.best_metric: %r is not measured, so that no checkpoint is the best one; there are %s", best, told)
        if this.sampler:
            save_samples(this, state, step, workdir)
            norms = to_host(spectral_norms(state.params), run.mesh)
            return {**scores, **{name: float(x) for name, x in norms.items()}}
        return scores

    began = time.perf_counter()
    settings = {
        **configs.plain(config),
        "evaluate_every_steps": this.durations["evaluate"],
        "checkpoint_every_steps": this.durations["checkpoint"],
    }
    writer, health = MetricsWriter(workdir, start), HealthMonitor()
    for line in read_metrics(workdir):
        health.update(line["step"], line)

    batches = iterate(this.batches, start, total, config.data.workers)
    try:
        with loop.Signals() as watch, Progress(start, total, config.batch_size) as progress:

            def show(step, metrics):
                progress.update(step, metrics)
                health.update(step, metrics)

            due = start > 0 and (start % this.durations["evaluate"] == 0 or start == total)
            new = any(gather(due and not evaluations.at("trained", start)))  # SIGTERM came in a step that was to be evaluated
            labels = evaluations.unmeasured("trained", start) if due else []
            if new or labels:
                with watchdog.paused():
                    scores = evaluate(start, state, labels)
                    writer.amend(start, scores)
                    checkpoints.rate(start, scores)
            state = loop.train(
                this.method, run, state, batches, total, writer, checkpoints, settings, configs.plain(config),
                this.schedules, evaluate, show, watch, watchdog, trace,
            )  # fmt: skip
    except loop.Interrupted:
        raise
    except Exception as error:  # whatever it was: before `finally`, which closes what waits for the other processes
        distributed.abort(error)
        raise
    finally:
        with watchdog.paused():
            trace.close()
            writer.close()
            checkpoints.close()
        if this.batches.skipped:
            log.warning("%d examples could not be read and were replaced (named above)", len(this.batches.skipped))
    share = goodput(read_metrics(workdir), read_starts(workdir))
    told = "" if share is None else f"; goodput {100 * share:.0f} % {SPAN}; the rest went into {REST}"
    log.info("%d steps in %.0f s%s", total - start, time.perf_counter() - began, told)
    with watchdog.paused():
        if evaluations.spec:  # the features are there already
            whole = functools.partial(open_eval, config)
            save_neighbors(last, whole, workdir / "pictures" / "neighbors.png")
        if distributed.is_lead():
            evaluations.show(config)
            log.info("report: %s", write_report(workdir))


def save_views(this: Experiment, workdir: Path) -> None:
    """`pictures/views.png`: a column per image, what the first phase sees of it in step 0 below it."""
    if this.method.views is None:
        return
    batch = this.batches[0]
    images = batch["image"][:8]
    key = jax.random.key(this.config.seed)
    for _ in ("step", "phase", "part"):  # as `engine.step` does; the method may draw more of it
        key = jax.random.fold_in(key, 0)
    views = jax.jit(this.method.views)(images, key)
    rows = [np.asarray(group) for group in (views.values() if isinstance(views, Mapping) else (views,))]
    originals = images if images.ndim == 4 else images[:, 0]
    if any(originals.shape[1:] == group.shape[2:] for group in rows):
        rows.insert(0, originals[:, None] / 255)
    height, width = (max(group.shape[axis] for group in rows) for axis in (2, 3))  # smaller views on white
    fill = [((0, 0), (0, 0), (0, height - group.shape[2]), (0, width - group.shape[3]), (0, 0)) for group in rows]
    padded = [np.pad(group, each, constant_values=1) for group, each in zip(rows, fill, strict=True)]
    save_grid(np.concatenate(padded, 1).swapaxes(0, 1), workdir / "pictures" / "views.png")
