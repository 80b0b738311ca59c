"""Train a config in a workdir.

  python launch.py train --config=configs/simclr.py --workdir=runs/simclr
  python launch.py train --config=configs/simclr.py:cifar10 --workdir=runs/c10 --config.seed=1 --config.optim.net.lr=0.1

The same command on the same workdir goes on from the last checkpoint that can be trusted, to the same numbers as a run that
was never stopped. SIGTERM saves and exits with 0 (or --saved_code), SIGINT (Ctrl-C) saves and exits with 130, kill -9 loses what came
after the last checkpoint. The workdir holds config.json, vocabulary.json (of texts), metrics.jsonl, log.txt, checkpoints/, pictures/,
evaluations.json, report.html.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from ssl_jax.cli.baselines import BASELINES, add_missing, baseline_context, initial_state, unmeasurable
from ssl_jax.cli.main import add_workdir
from ssl_jax.cli.report import write_report
from ssl_jax.data.pipeline import iterate
from ssl_jax.engine import loop
from ssl_jax.engine.checkpoint import Checkpoints, of_each_process, write_json
from ssl_jax.engine.health import Watch, spectral_norms
from ssl_jax.engine.metrics import REST, SPAN, MetricsWriter, goodput, read_metrics, read_starts, record_start
from ssl_jax.engine.pictures import save_grid
from ssl_jax.engine.sharding import to_host
from ssl_jax.engine.timing import Trace
from ssl_jax.engine.watchdog import Watchdog
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import distributed, launch_environment
from ssl_jax.experiment.build import Experiment, any_context, build_experiment, open_eval, provenance, start_jax
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.neighbors import save_neighbors
from ssl_jax.experiment.progress import Progress
from ssl_jax.experiment.sampler import save_samples
from ssl_jax.experiment.workdir import PATIENCE, check_same_workdir, lock_workdir, record_config
from ssl_jax.launchers import supervise

log = logging.getLogger(__name__)


def add_arguments(sub) -> None:
    sub.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:VARIANT; --config.KEY=VALUE overrides")
    add_workdir(sub)
    sub.add_argument("--processes", type=int, help="run as so many processes on this machine (on GPUs, one for each)")
    sub.add_argument("--profile", default="", metavar="START:END", help="trace these steps, for TensorBoard or Perfetto")
    sub.add_argument("--max_restarts", type=int, default=0, help="how often all --processes (or one) are started again when one fails")
    sub.add_argument(
        "--saved_code", type=int, default=0,
        help="exit code after a SIGTERM that saved (default: 0); engines that start a job again until it ends with 0 want another one",
    )  # fmt: skip


def main(args, overrides) -> int:
    processes = 1 if args.processes is None and args.max_restarts else args.processes
    if processes is not None and launch_environment.launched_process(os.environ) is None:
        started = launch_environment.detect_launcher(os.environ)
        if args.processes is None and started:
            raise UserError(f"--max_restarts={args.max_restarts}: {started} has started these processes, and has to start them again")
        flags = [f"--config={args.config}", f"--workdir={args.workdir}", f"--profile={args.profile}"]
        told = ["train", *flags, *overrides]
        return supervise.supervise(told, processes, args.workdir, args.max_restarts, args.saved_code)
    began = time.time()
    trace = Trace(args.workdir / "profile", args.profile)
    start_jax()
    config = load(args.config, overrides)
    distributed.check_same_config(configs.plain(config))  # first of all, as what `assemble` does together depends on the mesh
    with lock_workdir(args.workdir, PATIENCE if args.saved_code else 0.0):  # an engine may be faster than the end of the start before
        check_same_workdir(args.workdir)
        this = build_experiment(config, workdir=args.workdir)
        distributed.check_same_config(configs.plain(this.config))
        record_config(args.workdir, configs.plain(this.config))
        write_json(args.workdir / "provenance.json", provenance())
        record_start(args.workdir, began)
        restarted = launch_environment.launched_process(os.environ) is not None or args.saved_code != 0  # by `launchers.supervise`, or by an engine of `submit`
        try:
            with Watchdog(args.workdir / "processes", jax.process_index(), jax.process_count(), restarted) as watchdog:
                train(this, args.workdir, trace, watchdog)
        except loop.Interrupted as interrupted:
            print(f"{interrupted}; run the same command again to go on", file=sys.stderr)
            return args.saved_code if interrupted.signum == signal.SIGTERM else 128 + interrupted.signum
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


def train(this: Experiment, workdir: Path, trace: Trace, watchdog: Watchdog) -> None:
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
    writer, health = MetricsWriter(workdir, start), Watch()
    for line in read_metrics(workdir):
        health.update(line["step"], line)

    batches = iterate(this.batches, start, total, config.data.workers)
    try:
        with loop.Signals() as watch, Progress(start, total) as progress:

            def show(step, metrics):
                progress.update(step, metrics)
                health.update(step, metrics)

            due = start > 0 and (start % this.durations["evaluate"] == 0 or start == total)
            new = any(of_each_process(due and not evaluations.at("trained", start)))  # SIGTERM came in a step that was to be evaluated
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
    """`pictures/views.png`: a row per image, what the first phase sees of it in step 0."""
    if "views" not in this.method.fns:
        return
    batch = this.batches[0]
    images = batch["image"][:8]
    key = jax.random.key(this.config.seed)
    for _ in ("step", "phase", "part"):  # as `engine.step` does; the method may draw more of it
        key = jax.random.fold_in(key, 0)
    views = jax.jit(this.method.fns["views"])(images, key)
    rows = [np.asarray(group) for group in (views.values() if isinstance(views, Mapping) else (views,))]
    originals = images if images.ndim == 4 else images[:, 0]
    if any(originals.shape[1:] == group.shape[2:] for group in rows):
        rows.insert(0, originals[:, None] / 255)
    height, width = (max(group.shape[axis] for group in rows) for axis in (2, 3))  # smaller views on white
    fill = [((0, 0), (0, 0), (0, height - group.shape[2]), (0, width - group.shape[3]), (0, 0)) for group in rows]
    padded = [np.pad(group, each, constant_values=1) for group, each in zip(rows, fill, strict=True)]
    save_grid(np.concatenate(padded, 1), workdir / "pictures" / "views.png")
