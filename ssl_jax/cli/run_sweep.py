"""What `launch.py sweep` does with its flags: the plan, its runs on this machine or elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ssl_jax.errors import UserError
from ssl_jax.experiment import runs, sweep_folder, sweep_optuna
from ssl_jax.experiment import sweep as sweeps
from ssl_jax.experiment.sweep_search import draw, is_range, read_axis
from ssl_jax.launchers import jobs, shares, supervise
from ssl_jax.report import sweep_table
from ssl_jax.where import as_called


def run_sweep(args, rest) -> int:
    """Returns the exit code. Raises UserError for a plan that cannot be trained."""
    rest = [*rest, *(text for texts in args.zip for text in texts if text.startswith("--"))]  # flags with spaces in them
    args.zip = [[text for text in texts if not text.startswith("--")] for texts in args.zip]
    common = [argument for argument in rest if argument.startswith("--config.")]
    others = [argument for argument in rest if not argument.startswith("--config.")]
    if others and args.to == "local":
        raise UserError(f"argument {others[0]!r} is not understood; see `python launch.py sweep --help`")
    if args.search == "optuna":
        return _search(args, common)
    sweep = _sweep(args)
    sweeps.check(sweep)
    _check_common(sweep, common)
    plan = sweep_folder.record(sweep, common, args.workdir)
    if args.only is not None:
        return _train_one(plan, args.workdir, args.only)
    from ssl_jax.experiment import sweep_check  # imports JAX, which --help avoids

    sweep_check.check_configs(plan)
    if args.to != "local":
        return _submit(args, plan, common, others)
    parts = shares.divide(args.jobs, os.environ)
    left = [run for run in plan["runs"] if not runs.finished(args.workdir / run["workdir"])]
    sizes = sweep_check.check_shapes(plan, {run["name"] for run in left})
    if args.dry_run:
        _print_plan(plan, left, sizes, args)
        for run in sweep_folder.planned_runs(plan, args.workdir):
            print(f"{run.name}: {run.workdir}")
        return 0
    jobs.check_ended(jobs.earlier(args.workdir), args.workdir)
    with sweep_folder.lock(args.workdir):
        plan = sweep_folder.record(sweep, common, args.workdir)  # again: another sweep may have ended just now
        sweep_folder.write(plan, args.workdir)
        _print_plan(plan, left, sizes, args)
        return _train(plan, args, parts, sizes)


# ---------------------------------------------------------------------------------------------------- the plan


def _sweep(args) -> sweeps.Sweep:
    """The sweep of the flags. Raises UserError for flags that do not go together."""
    if bool(args.sweep) == bool(args.config):
        raise UserError("give either --sweep=sweeps/NAME.py, or --config=configs/NAME.py with --vary KEY=VALUE,...")
    if args.search == "grid" and args.trials:
        raise UserError(f"--trials={args.trials} is for --search=random or optuna, which draw them; add that or leave out --trials")
    if args.sweep:
        if args.vary or args.zip or args.search != "grid":
            raise UserError(f"--sweep={args.sweep} has its own variations; leave out --vary, --zip and --search, or give --config")
        sweep = sweeps.read_file(args.sweep)
    else:
        sweep = sweeps.Sweep(_variations(args, _axes(args)))
    seeds = sweep.seeds if args.seeds is None else args.seeds
    return sweep._replace(seeds=seeds, baseline=args.baseline or sweep.baseline)


def _axes(args) -> list[dict[str, list[str]]]:
    """The axes of --vary and --zip. Raises UserError where a key is varied twice."""
    axes = [dict([read_axis("--vary", text)]) for text in args.vary] + [_together(texts) for texts in args.zip]
    keys = [key for axis in axes for key in axis]
    twice = [key for number, key in enumerate(keys) if key in keys[:number]]
    if twice:
        raise UserError(f"the key {twice[0]} is varied twice; give one --vary with all of its values")
    return axes


def _together(texts: Sequence[str]) -> dict[str, list[str]]:
    pairs = [read_axis("--zip", text) for text in texts]
    if len(dict(pairs)) < len(pairs):
        raise UserError(f"--zip {' '.join(texts)} names a key twice; give each once")
    return dict(pairs)


def _variations(args, axes: Sequence[Mapping[str, Sequence[str]]]) -> list[sweeps.Variation]:
    ranges = [f"{key}={values[0]}" for axis in axes for key, values in axis.items() if is_range(values)]
    if args.search == "random":
        if not axes or args.trials is None:
            raise UserError("--search=random draws --trials=N variations from --vary KEY=log:LOW:HIGH or KEY=VALUE,...; give both")
        return draw(args.config, axes, args.trials, args.search_seed)
    if ranges:
        raise UserError(f"--vary {ranges[0]} is a range, from which --search=random --trials=N draws; give that, or values")
    return sweeps.product(args.config, *axes)


def _check_common(sweep: sweeps.Sweep, common: Sequence[str]) -> None:
    """Raises UserError where --config.KEY=VALUE sets what the sweep varies, or the seed."""
    varied = {key for variation in sweep.variations for key in variation.overrides}
    for argument in common:
        key = argument.removeprefix("--config.").partition("=")[0]
        if key == "seed":
            raise UserError(f"{argument}: a sweep gives the seeds; say --seeds=0,4,7")
        if key in varied:
            raise UserError(f"{argument} sets what the sweep varies; leave one of them out")


def _print_plan(plan: Mapping[str, Any], left: Sequence[Mapping], sizes: Mapping, args) -> None:
    done = len(plan["runs"]) - len(left)
    parts = [f"{len(plan['runs'])} runs: {len(plan['variations'])} variations x {len(plan['seeds'])} seeds"]
    parts += [f"{done} are done"] if done else []
    parts += [f"{args.jobs} at once"] if args.jobs > 1 else []
    print(f"{plan['name']}: {', '.join(parts)}, in {args.workdir}")
    steps = sum(sizes[run["name"]].steps for run in left)
    disk = sum(sizes[run["name"]].bytes for run in left)
    print(f"to train: {steps:,} steps; checkpoints take about {sweep_table.size(disk)}; the first steps will tell the time", flush=True)


# ---------------------------------------------------------------------------------------------------- on this machine


def _train(plan, args, parts, sizes) -> int:
    def left() -> int:
        unfinished = [row for row in plan["runs"] if not runs.finished(args.workdir / row["workdir"])]
        return sum(sizes[row["name"]].steps - runs.progress(args.workdir / row["workdir"]).step for row in unfinished)

    return _train_runs(plan, args, parts, sweep_folder.planned_runs(plan, args.workdir), len(plan["runs"]), left)


def _search(args, common: Sequence[str]) -> int:
    """Train one trial after the other, as Optuna draws them. Raises UserError for flags that do not go together."""
    axes = _axes(args)
    if args.sweep or len(args.config) != 1 or not axes or args.trials is None:
        raise UserError("--search=optuna draws --trials=N variations of one --config from --vary KEY=log:LOW:HIGH or KEY=VALUE,...")
    if args.to != "local" or args.baseline:
        unfit = "--baseline" if args.baseline else "--to"
        raise UserError(f"--search=optuna runs on this machine, without a baseline; leave out {unfit}")
    seeds = [0] if args.seeds is None else args.seeds
    if len(seeds) > 1:
        raise UserError(f"--search=optuna judges single runs, and --seeds gives {len(seeds)}; give one, as in --seeds=0,")
    (config,) = args.config
    ends = sweeps.Sweep(sweep_optuna.corners(config, axes), seeds)
    sweeps.check(ends)
    _check_common(ends, common)
    from ssl_jax.experiment import sweep_check, training

    plan = {"variations": sweep_folder.described(ends, common), "seeds": seeds}
    sweep_check.check_configs(plan)
    parts = shares.divide(args.jobs, os.environ)
    sizes = sweep_check.check_shapes(plan, [each.name for each in ends.variations])
    steps, disk = (max(size[part] for size in sizes.values()) * args.trials for part in (0, 1))
    shown = f"{args.trials} trials of {config}; at most {steps:,} steps; checkpoints take about {sweep_table.size(disk)}"
    if args.dry_run:
        print(shown)
        return 0
    best_metric = training.load_config(config, common).best_metric
    jobs.check_ended(jobs.earlier(args.workdir), args.workdir)
    with sweep_folder.lock(args.workdir):
        search = sweep_optuna.Search(config, axes, common, seeds[0], best_metric, args.workdir, args.search_seed)
        print(shown, flush=True)
        plan, planned = search.plan(), search.planned_runs(args.trials)

        def left() -> int:
            return steps - sum(runs.progress(args.workdir / row["workdir"]).step for row in plan["runs"])

        def on_event(kind: str, run: runs.Run) -> None:
            search.on_event(kind, run)
            plan.update(search.plan())

        return _train_runs(plan, args, parts, planned, args.trials, left, on_event, search.stopped)


def _train_runs(plan, args, parts, planned, count: int, steps_left, ended=lambda kind, run: None, stopped=lambda run: "") -> int:
    """Train runs with a table or lines about them; returns the exit code.

    Args:
        planned: the runs, taken one by one.
        count: how many there will be.
        steps_left: a function that gives the steps of all that is not done.
        ended: called with an event as in `runs.train_all`, and its run.
        stopped: as there, asked every two seconds.
    """
    console = Console()
    started: list[Path] = []
    looked: dict[Path | None, float] = {}  # when; None: for the estimate
    with sweep_table.LiveTable(plan, args.workdir, console) as view:

        def on_event(kind: str, run: runs.Run, line: str) -> None:
            ended(kind, run)
            if kind == "started":
                started.append(run.workdir)
            metric = runs.progress(run.workdir).metric if kind == "finished" else ""
            if kind == "failed" or not console.is_terminal:
                result = f": {metric or line}" if metric or line else ""
                view.say(f"{kind} {_number(plan, run, args.workdir)} of {count}: {run.name}{result}")

        def estimate() -> None:
            if time.monotonic() - looked.get(None, 0.0) < runs.EVERY:
                return
            looked[None] = time.monotonic()
            measured = (runs.progress(workdir).seconds_per_step for workdir in started)
            seconds = next((seconds for seconds in measured if seconds is not None), None)
            if seconds is None:
                return
            looked[None] = math.inf
            took = sweep_table.duration(steps_left() * seconds / args.jobs)
            view.say(f"estimated time: about {took} of steps ({seconds:.3g} s each, measured on the first run), and evaluations on top")

        def give_up(run: runs.Run) -> str:
            if time.monotonic() - looked.get(run.workdir, 0.0) < runs.EVERY:
                return ""
            looked[run.workdir] = time.monotonic()
            return stopped(run)

        failed = runs.train_all(
            planned, supervise.launch_command(), shares=parts, fail_fast=args.fail_fast,
            on_event=on_event, on_poll=estimate, stopped=give_up,
        )
    print(f"{plan['name']}: {sweep_table.summary(sweep_table.read_progress(plan, args.workdir))}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return UserError.code if failed else 0


def _number(plan: Mapping[str, Any], run: runs.Run, workdir: Path) -> int:
    """The place of a run in its plan, from 1."""
    return [each.workdir for each in sweep_folder.planned_runs(plan, workdir)].index(run.workdir) + 1


# ---------------------------------------------------------------------------------------------------- elsewhere


def _submit(args, plan, common: Sequence[str], others: Sequence[str]) -> int:
    """Send the runs that are not done as one job. Raises UserError for wrong flags, or while an earlier job is alive."""
    from ssl_jax.cli.submit import engine_options

    options, left_over = engine_options(args.to, others, "sweep")
    planned = sweep_folder.planned_runs(plan, args.workdir)
    only = [number for number, run in enumerate(planned) if not runs.finished(run.workdir)]
    if not only:
        print(f"{plan['name']}: all {len(planned)} runs are done")
        return 0
    before = jobs.earlier(args.workdir)
    number = before["number"] + 1 if before else 1
    request = jobs.JobRequest("", _flags(args, common), args.workdir, args.max_restarts, number, options, left_over, tuple(only))
    jobs.check_words(request)
    sent = jobs.engine(args.to).describe(request)
    if args.dry_run:
        print(sent)
        return 0
    jobs.check_ended(before, args.workdir)
    with sweep_folder.lock(args.workdir):
        sweep_folder.write(plan, args.workdir)
        job = jobs.start(request, args.to, sent)
    remedy = as_called(f"`python launch.py status --workdir={args.workdir}` prints their states")
    print(f"{args.to} job {job['id']} submitted for {len(only)} runs; {remedy}")
    return 0


def _flags(args, common: Sequence[str]) -> list[str]:
    """The flags that give the same plan on another machine."""
    flags = [f"--sweep={args.sweep}"] if args.sweep else [f"--config={config}" for config in args.config]
    flags += [f"--vary={text}" for text in args.vary]
    flags += [word for texts in args.zip for word in ("--zip", *texts)]
    flags += [f"--seeds={','.join(map(str, args.seeds))},"] if args.seeds is not None else []
    flags += [f"--baseline={args.baseline}"] if args.baseline else []
    if args.search != "grid":
        flags += [f"--search={args.search}", f"--trials={args.trials}", f"--search_seed={args.search_seed}"]
    return [*flags, *common]


def _train_one(plan: Mapping[str, Any], workdir: Path, number: int) -> int:
    """Train one run in this process, as a job of an array; returns the exit code of `train`, with 75 for saved."""
    from ssl_jax.cli.main import main as launch

    planned = sweep_folder.planned_runs(plan, workdir)
    if number >= len(planned):
        raise UserError(f"--only={number} is none of the {len(planned)} runs; give a lower number")
    run = planned[number]
    if runs.finished(run.workdir):
        return 0
    if os.environ.get("SLURM_PROCID", "0") != "0":  # another process of the same run
        return launch(run.arguments())
    run.workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "sweep.json").exists() or sweep_folder.read(workdir) != plan:
        sweep_folder.write(plan, workdir)
    with open(run.workdir / "output.txt", "a", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    runs.note_start(run.workdir, os.getpid())
    try:
        code = launch(run.arguments())
    except Exception:  # noqa: BLE001  a bug: the last line of its traceback becomes the line of the run
        traceback.print_exc()
        code = 1
    runs.note_end(run.workdir, code, code == 0 and runs.finished(run.workdir))
    return code
