"""Stages: earlier runs whose weights a run uses frozen, such as the tokenizer of a prior.

  config.stages = dict(tokenizer=dict(workdir="runs/tokens", recipe="configs/vit_vqgan.py"))

`step` says which checkpoint (None: the newest). The resolved config of the stage, its step and a fingerprint of its weights become
part of the run's config. A run therefore never resumes, is never evaluated or exported with other weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from ssl_jax.engine.checkpoint import Checkpoints, checksums
from ssl_jax.engine.renamed_keys import first_names
from ssl_jax.errors import UserError
from ssl_jax.experiment.workdir import read_config

log = logging.getLogger(__name__)


def open_stages(config) -> tuple[Any, dict]:
    """(a copy of `config` with `config.stages` filled in, {name: {'params': ..., 'mutable': ...}}).

    Raises:
        UserError: a stage has no workdir, no such checkpoint, or other weights than the run was started with.
    """
    config, frozen = config.copy_and_resolve_references(), {}
    with config.unlocked():
        for name, stage in config.get("stages", {}).items():
            if not stage.workdir:
                raise UserError(
                    f"config.stages.{name}.workdir is not set; train that stage (launch.py train --config={stage.recipe} "
                    f"--workdir=DIR) and give --config.stages.{name}.workdir=DIR"
                )
            described, frozen[name] = _open(name, stage)
            config.stages[name].update(described)
    return config, frozen


def _open(name: str, stage) -> tuple[dict, dict]:
    """({'config', 'step', 'fingerprint'}, weights) of the checkpoint that `stage` names."""
    flag = f"config.stages.{name}.workdir={stage.workdir}"
    if not Path(stage.workdir, "config.json").is_file():
        raise UserError(f"{flag} holds no run (no config.json); train --config={stage.recipe}, or give the directory of a run")
    trained, frozen = open_stages(read_config(Path(stage.workdir)))
    saved = Checkpoints(Path(stage.workdir) / "checkpoints", read_only=True)
    try:
        steps, step = saved.steps(), stage.get("step")
        if not steps or (step is not None and step not in steps):
            raise UserError(f"{flag} has no checkpoint {'' if step is None else step}; there are {steps or 'none'}")
        step = steps[-1] if step is None else step
        weights = saved.read(step)
    finally:
        saved.close()
    fingerprint = hashlib.sha256(json.dumps(checksums(first_names(weights)), sort_keys=True).encode()).hexdigest()[:16]
    if stage.get("fingerprint", fingerprint) != fingerprint:
        raise UserError(
            f"{flag}: checkpoint {step} has other weights ({fingerprint}) than this run was started with ({stage.fingerprint}); "
            "restore those, or start another run"
        )
    log.info("stage %s: %s of %s at step %d, weights %s", name, trained.method, stage.workdir, step, fingerprint)
    weights["mutable"] = {**weights["mutable"], **frozen}
    return {"config": trained, "step": step, "fingerprint": fingerprint}, weights
