"""Stages: earlier runs whose weights a run uses frozen, such as the tokenizer of a prior.

  config.stages = dict(tokenizer=dict(workdir="runs/tokens", recipe="configs/vit_vqgan.py"))

`step` says which checkpoint (None: the newest); `untrained=True` takes the initial weights of that run instead. The resolved config
of the stage, its step and a fingerprint of its weights become part of the run's config. A run therefore never resumes, is never
evaluated or exported with other weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssl_jax.engine.checkpoint import Checkpoints, checksums
from ssl_jax.engine.renamed_keys import first_names
from ssl_jax.errors import UserError
from ssl_jax.experiment.workdir import read_config
from ssl_jax.methods import build_method

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
    if stage.get("untrained"):
        log.info("stage %s: %s of %s with its initial weights", name, trained.method, stage.workdir)
        return {"config": trained}, _initial(trained, frozen)
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


def _initial(config, frozen: Mapping) -> dict:
    """The weights of a run before its first step, from its seed."""
    method = build_method(config)
    batch = {name: np.zeros((8, *spec.shape), spec.dtype) for name, spec in method.inputs.items()}
    params, mutable = jax.device_get(jax.jit(method.init)(jax.random.key(config.seed), batch, dict(frozen)))
    return {"params": params, "mutable": {**mutable, **frozen}}
