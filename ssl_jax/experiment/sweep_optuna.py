"""`sweep --search=optuna`: each trial is drawn after those that have ended, and one that is worse than most is stopped early.

Trials are kept in WORKDIR/optuna.log (Optuna's journal), so that a search goes on where it was ended. `sweep.json` follows from it.
Imports no JAX, and Optuna only when a search begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax.engine.records import read_evaluations
from ssl_jax.errors import UserError
from ssl_jax.experiment import runs, sweep_folder
from ssl_jax.experiment.sweep import Sweep, Variation, named
from ssl_jax.experiment.sweep_search import is_range, read_range

Axes = Sequence[Mapping[str, Sequence[str]]]


def corners(config: str, axes: Axes) -> list[Variation]:
    """Two variations to check before the search: with the first values and with the last values of all axes."""
    found = []
    for place in (0, -1):
        ends = {key: _end(key, values, place) for axis in axes for key, values in axis.items()}
        found.append(Variation(f"{named(config, {})} with {'low' if place == 0 else 'high'} values", config, ends))
    return found


def _end(key: str, values: Sequence[str], place: int) -> str:
    if not is_range(values):
        return values[place]
    kind, *ends = read_range(key, values[0])
    return str(int(ends[place])) if kind == "int" else f"{ends[place]:g}"


class Search:
    """A search in a directory that this process has locked."""

    def __init__(self, config: str, axes: Axes, common: Sequence[str], seed: int, best_metric: str, workdir: Path, draws: int):
        """Open the journal of `workdir`, or begin one.

        Args:
            seed: of the runs.
            best_metric: config.best_metric of the runs; a '-' before it means that less is better.
            draws: the seed of the draws.

        Raises:
            UserError: Optuna is not installed, the runs have no best_metric, or `workdir` holds another sweep.
        """
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise UserError("--search=optuna needs Optuna; pip install -r requirements-search.txt, or give --search=random") from None
        if not best_metric:
            remedy = "give --config.best_metric=LABEL/NAME, with '-' before it if less is better"
            raise UserError(f"--search=optuna needs a number to improve, and config.best_metric is empty; {remedy}")
        if (workdir / "sweep.json").exists() and not (workdir / "optuna.log").exists():
            raise UserError(f"--workdir={workdir} holds a sweep that is no search by Optuna; give another --workdir")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna, self.workdir, self.common, self.seed = optuna, workdir, list(common), seed
        self.config, self.axes, self.metric = config, axes, best_metric.removeprefix("-")
        asked = {"config": config, "axes": [dict(axis) for axis in axes], "common": self.common, "seed": seed, "metric": best_metric}
        self.study = optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(workdir / "optuna.log"))),
            study_name="sweep",
            direction="minimize" if best_metric.startswith("-") else "maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(),
        )
        # A sampler begins its draws at its seed, so one that goes on needs another.
        self.study.sampler = optuna.samplers.TPESampler(seed=draws + len(self.study.trials))
        if self.study.user_attrs.get("asked", asked) != asked:
            raise UserError(f"--workdir={workdir} holds a search with other flags; give those, or another --workdir")
        self.study.set_user_attr("asked", asked)
        self.running: dict[Path, Any] = {}  # trials by the workdirs of their runs
        self.reported: dict[Path, set[int]] = {}  # steps whose evaluation Optuna has

    def planned_runs(self, trials: int) -> Iterator[runs.Run]:
        """The runs of trials that were interrupted, then of new ones until there are `trials`."""
        open_state = self.optuna.trial.TrialState.RUNNING
        waiting = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state == open_state]
        for frozen in waiting:
            trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
            run = self._run(trial, trial.user_attrs.get("values") or self._draw(trial))
            if runs.finished(run.workdir):  # it ended while the search was being killed
                self.on_event("finished", run)
            else:
                yield run
        while len(self.study.get_trials(deepcopy=False)) < trials:
            trial = self.study.ask()
            yield self._run(trial, self._draw(trial))

    def plan(self) -> dict[str, Any]:
        """What `sweep.json` holds: the trials so far."""
        known = [trial for trial in self.study.get_trials(deepcopy=False) if "values" in trial.user_attrs]
        variations = [Variation(self._name(trial.number), self.config, trial.user_attrs["values"]) for trial in known]
        return sweep_folder.record(Sweep(variations, (self.seed,)), self.common, self.workdir)

    def _name(self, number: int) -> str:
        return f"{named(self.config, {})} trial-{number}"

    def _draw(self, trial) -> dict[str, str]:
        values: dict[str, str] = {}
        for axis in self.axes:
            keys = list(axis)
            if is_range(axis[keys[0]]):
                kind, low, high = read_range(keys[0], axis[keys[0]][0])
                if kind == "int":
                    values[keys[0]] = str(trial.suggest_int(keys[0], int(low), int(high)))
                else:
                    values[keys[0]] = f"{trial.suggest_float(keys[0], low, high, log=kind == 'log'):.6g}"
            else:
                place = trial.suggest_categorical(",".join(keys), list(range(len(axis[keys[0]]))))
                values |= {key: axis[key][place] for key in keys}
        trial.set_user_attr("values", values)
        return values

    def _run(self, trial, values: Mapping[str, str]) -> runs.Run:
        plan = self.plan()
        sweep_folder.write(plan, self.workdir)
        name = f"{self._name(trial.number)} seed {self.seed}"
        run = next(run for run in sweep_folder.planned_runs(plan, self.workdir) if run.name == name)
        self.running[run.workdir] = trial
        self.reported[run.workdir] = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        return run

    def stopped(self, run: runs.Run) -> str:
        """Why a running run should end early: at an evaluation it is worse than the median of the earlier trials; '' to go on."""
        trial, reported = self.running[run.workdir], self.reported[run.workdir]
        for step, value in self._values(run.workdir):
            if step in reported:
                continue
            trial.report(value, step)
            reported.add(step)
            if trial.should_prune():
                return f"stopped at step {step}: {self.metric} {value:.4g} is worse than the median of earlier trials"
        return ""

    def on_event(self, kind: str, run: runs.Run) -> None:
        """Tell Optuna how a run has ended: 'finished', 'failed' or 'stopped'. Interrupted trials stay open."""
        states = self.optuna.trial.TrialState
        values = self._values(run.workdir)
        if kind == "finished" and values:
            self.study.tell(self.running.pop(run.workdir), values[-1][1])
        elif kind in ("finished", "failed", "stopped"):
            self.study.tell(self.running.pop(run.workdir), state=states.PRUNED if kind == "stopped" else states.FAIL)

    def _values(self, workdir: Path) -> list[tuple[int, float]]:
        """(step, metric) at each evaluation so far, in order."""
        entries = []
        with contextlib.suppress(UserError):  # damaged; `train` names it
            entries = [entry for entry in read_evaluations(workdir) if entry["subject"] == "trained"]
        entries = [entry for entry in entries if self.metric in entry["metrics"]]
        return sorted({entry["step"]: entry["metrics"][self.metric] for entry in entries}.items())
