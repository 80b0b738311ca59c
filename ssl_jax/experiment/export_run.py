"""Exports the encoder of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from ssl_jax.engine.checkpoint import Checkpoints
from ssl_jax.engine.records import read_evaluations, read_json
from ssl_jax.errors import UserError
from ssl_jax.experiment.config import resolve
from ssl_jax.experiment.distributed import start_jax
from ssl_jax.experiment.provenance import provenance
from ssl_jax.experiment.stages import open_stages
from ssl_jax.experiment.workdir import read_config
from ssl_jax.export import FORMATS, TOLERANCES, NoTorchLayout, make_source, write

log = logging.getLogger(__name__)


def export(workdir: Path, folder: Path, form: str, step: int | None, dtype: str) -> Iterator[tuple[Path, dict]]:
    """Write the encoder into `folder`/<format> and yield (that folder, its card) for each format.

    Args:
        form: the format; 'all': every one that the encoder has.
        step: of the checkpoint; None: the last one of a finished run.
        dtype: of the exported computation, 'float32' or 'bfloat16'.

    Raises:
        UserError: an unknown format or dtype, no such run or checkpoint, or an unfinished run.
        NoTorchLayout: `form` is 'safetensors', and the encoder has no counterpart in torchvision or timm.
    """
    start_jax()
    for flag, value, valid in (("format", form, (*FORMATS, "all")), ("dtype", dtype, tuple(TOLERANCES))):
        if value not in valid:
            raise UserError(f"--{flag}={value} is unknown; choose {', '.join(valid)}")
    config = read_config(workdir)
    config.dtype = dtype
    total = resolve(config, config.data.examples)["total"]
    step, saved = read_checkpoint(workdir, total, step)
    _, frozen = open_stages(config)
    source = make_source(config, saved["params"], {**saved["mutable"], **frozen})
    about = {"step": step, "total_steps": total, **scores(workdir, step), "versions": versions(workdir), "vocabulary": words(workdir)}
    for name in FORMATS if form == "all" else [form]:
        try:
            card = write(folder / name, name, source, about)
        except NoTorchLayout as error:
            if form != "all":
                raise
            log.warning("no %s: %s", name, error)
            continue
        yield folder / name, card


def read_checkpoint(workdir: Path, total: int, step: int | None) -> tuple[int, dict]:
    """(step, {'params', 'mutable'}) of checkpoint `step`; None: the last one of a finished run.

    Raises:
        UserError: there is no such checkpoint, it is corrupt, or `step` is None and the run is unfinished.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(f"{workdir} has no checkpoint {'' if step is None else step}; there are {steps or 'none'}")
        if step is None and steps[-1] < total:
            raise UserError(
                f"{workdir} is unfinished (step {steps[-1]} of {total}); finish it with the same train command, "
                f"or export its newest checkpoint with --step={steps[-1]}"
            )
        step = steps[-1] if step is None else step
        return step, checkpoints.read(step)
    finally:
        checkpoints.close()


def scores(workdir: Path, step: int) -> dict:
    """{'metrics', 'protocols'} of the run at `step`; both empty where it was not evaluated then."""
    found = [entry for entry in read_evaluations(workdir) if (entry["subject"], entry["step"]) == ("trained", step)]
    return {name: {k: v for entry in found for k, v in entry[name].items()} for name in ("metrics", "protocols")}


def versions(workdir: Path) -> dict:
    """The provenance of the training and of this export."""
    path = workdir / "provenance.json"
    training = read_json(path, dict, remedy="move it away, and export again") if path.exists() else None
    return {"training": training, "export": provenance()}


def words(workdir: Path) -> dict:
    """The vocabulary of the run's texts and answers; empty where it reads none."""
    path = workdir / "vocabulary.json"
    return read_json(path, dict, remedy="restore it from a backup") if path.exists() else {}
