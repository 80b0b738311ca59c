"""Runs that a run stands on: the config of each becomes a part of its config, the weights of each come from its checkpoint.

  config.stages = dict(tokenizer=dict(workdir="runs/tokens", recipe="configs/vit_vqgan.py"))

`step` says which checkpoint (None: the newest). What was found is written into the config of the run: the resolved config of the
stage, the step and a fingerprint of the weights, so that a run never goes on, is evaluated or exported on other ones.
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
    """(a copy of `config` in which `config.stages` is filled in, {name: {'params': ..., 'mutable': ...}} on the host's device).

    Raises:
        UserError: no workdir is given, or it holds no such checkpoint, or other weights than those that `config` was filled in with.
    """
    config, frozen = config.copy_and_resolve_references(), {}
    with config.unlocked():
        for name, stage in config.get("stages", {}).items():
            if not stage.workdir:
                raise UserError(
                    f"config.stages.{name}.workdir is not set: this run stands on another one. Train it (launch.py train "
                    f"--config={stage.recipe} --workdir=DIR) and give --config.stages.{name}.workdir=DIR"
                )
            described, frozen[name] = _open(name, stage)
            config.stages[name].update(described)
    return config, frozen


def _open(name: str, stage) -> tuple[dict, dict]:
    """({'config', 'step', 'fingerprint'}, the weights) of the checkpoint that `stage` names."""
    asked = f"config.stages.{name}.workdir={stage.workdir}"
    if not Path(stage.workdir, "config.json").is_file():
        raise UserError(f"{asked} holds no run (no config.json); train one with --config={stage.recipe}, or give the directory of one")
    trained, frozen = open_stages(read_config(Path(stage.workdir)))
    saved = Checkpoints(Path(stage.workdir) / "checkpoints", read_only=True)
    try:
        steps, step = saved.steps(), stage.get("step")
        if not steps or (step is not None and step not in steps):
            raise UserError(f"{asked} has no checkpoint {'' if step is None else step}; there are {steps or 'none'}")
        step = steps[-1] if step is None else step
        weights = saved.read(step)
    finally:
        saved.close()
    fingerprint = hashlib.sha256(json.dumps(checksums(first_names(weights)), sort_keys=True).encode()).hexdigest()[:16]
    if stage.get("fingerprint", fingerprint) != fingerprint:
        raise UserError(
            f"{asked}: checkpoint {step} has other weights ({fingerprint}) than this run was started with ({stage.fingerprint}); "
            "bring those back, or start another run"
        )
    log.info("stage %s: %s of %s at step %d, weights %s", name, trained.method, stage.workdir, step, fingerprint)
    weights["mutable"] = {**weights["mutable"], **frozen}
    return {"config": trained, "step": step, "fingerprint": fingerprint}, weights
