"""Evaluates a checkpoint of a run as its config says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssl_jax.engine.checkpoint import Checkpoints, Corrupt
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment, context, start_jax
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.workdir import read_config


def evaluate(workdir: Path, overrides: Sequence[str] = (), step: int | None = None) -> None:
    """Evaluate checkpoint `step` (None: the newest) as the config of the run says; prints the table and writes evaluations.json.

    Raises:
        UserError: there is no such run or checkpoint, or the overrides are wrong.
    """
    start_jax()
    trained = read_config(workdir)
    config = configs.apply_overrides(trained.copy_and_resolve_references(), overrides)
    if overrides and (config.data, config.evals) != (trained.data, trained.evals):
        config.references = {}  # recorded under the evaluations that the run was trained with
    evals.check(config.evals)
    this = build_experiment(config)
    state = restore(workdir, this, step)
    evaluations = Evaluations(workdir, this.config.evals)
    evaluations.add("trained", int(state.step), context(this, state))
    evaluations.show(this.config)


def restore(workdir, this, step: int | None = None):
    """The state of a finished or running run: checkpoint `step`, or the newest.

    Raises:
        UserError: there is no such checkpoint, or it is corrupt.
        MachineFault: the processes do not see the same checkpoints.
    """
    saved = Checkpoints(workdir / "checkpoints", read_only=True)
    steps = saved.agreed_steps()
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{workdir} has no checkpoint {'' if step is None else step}; there are {steps or 'none'}")
    step = steps[-1] if step is None else step
    try:
        return saved.restore(step, this.run.abstract)
    except Corrupt as error:
        raise UserError(f"checkpoint {step} in {workdir} is corrupt: {error}; choose another with --step, there are {steps}") from error
    finally:
        saved.close()
