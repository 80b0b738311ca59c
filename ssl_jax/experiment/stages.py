"""Stages: earlier runs, or weights of others, that a run uses frozen, such as the tokenizer of a prior.

  config.stages = dict(tokenizer=dict(workdir="runs/tokens", recipe="configs/vit_vqgan.py"))
  config.stages = dict(backbone=dict(workdir="", weights="dinov2_vits14_pretrain.pth", recipe="configs/simclr.py"))

`step` says which checkpoint (None: the newest); `untrained=True` takes the initial weights of that run, or of the network in that
file, instead. The resolved config of the stage, its step and a fingerprint of its weights become part of the run's config. A run
therefore never resumes, is never evaluated or exported with other weights.
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
from ml_collections import ConfigDict

from ssl_jax.engine.checkpoint import Checkpoints, checksums
from ssl_jax.engine.method import Method
from ssl_jax.engine.renamed_keys import first_names
from ssl_jax.errors import UserError
from ssl_jax.experiment.workdir import read_config
from ssl_jax.methods import build_method
from ssl_jax.models.pretrained.foreign import ForeignEncoder, read_encoder

log = logging.getLogger(__name__)


def open_stages(config) -> tuple[Any, dict]:
    """(a copy of `config` with `config.stages` filled in, {name: {'params': ..., 'mutable': ...}}).

    Raises:
        UserError: a stage has no workdir, no such checkpoint, or other weights than the run was started with.
    """
    config, frozen = config.copy_and_resolve_references(), {}
    with config.unlocked():
        for name, stage in config.get("stages", {}).items():
            check_source(name, stage)
            described, frozen[name] = _open_file(name, stage, config) if stage.get("weights") else _open(name, stage)
            config.stages[name].update(described)
    return config, frozen


def check_source(name: str, stage) -> None:
    """Raises UserError unless `stage` names a run, or a file of weights where its recipe allows one."""
    if stage.get("weights") and (stage.workdir or stage.get("step") is not None):
        other = f"workdir={stage.workdir}" if stage.workdir else f"step={stage.step}"
        raise UserError(f"config.stages.{name} has weights={stage.weights} and {other}; give a run, or a file of weights alone")
    if not stage.workdir and not stage.get("weights"):
        file = f", or a file of weights with --config.stages.{name}.weights=FILE" if "weights" in stage else ""
        raise UserError(
            f"config.stages.{name}.workdir is not set; train that stage (launch.py train --config={stage.recipe} "
            f"--workdir=DIR) and give --config.stages.{name}.workdir=DIR{file}"
        )


def foreign_config(encoder: ForeignEncoder, config) -> ConfigDict:
    """The config of the method 'pretrained' for an encoder of others, beside the run of `config`: of its seed and dtype."""
    return ConfigDict(
        {
            "method": "pretrained",
            "seed": config.seed,
            "dtype": config.dtype,
            "data": {"image_shape": (encoder.size, encoder.size, 3)},
            "model": {"encoder": encoder.spec, "mean": encoder.mean, "std": encoder.std},
        }
    )


def foreign_weights(encoder: ForeignEncoder) -> dict:
    """{'params', 'mutable'} of the method 'pretrained'."""
    return {"params": {"net": {"encoder": encoder.params}}, "mutable": {"batch_stats": {"encoder": encoder.batch_stats}}}


def fingerprint_of(weights: Mapping) -> str:
    """16 hex digits that differ with any number of {'params', 'mutable'}, or with a name."""
    return hashlib.sha256(json.dumps(checksums(first_names(weights)), sort_keys=True).encode()).hexdigest()[:16]


def _open_file(name: str, stage, config) -> tuple[dict, dict]:
    """({'config', 'fingerprint'}, weights) of the encoder in the file that `stage` names."""
    encoder = read_encoder(stage.weights)
    own = foreign_config(encoder, config)
    if stage.get("untrained"):
        log.info("stage %s: the network of %s with initial weights", name, stage.weights)
        return {"config": own}, _initial(own, {})
    weights = foreign_weights(encoder)
    fingerprint = fingerprint_of(weights)
    _check_fingerprint(f"config.stages.{name}.weights={stage.weights}", stage, fingerprint)
    log.info("stage %s: %s, weights %s", name, stage.weights, fingerprint)
    return {"config": own, "fingerprint": fingerprint}, weights


def _check_fingerprint(source: str, stage, found: str) -> None:
    if stage.get("fingerprint", found) != found:
        raise UserError(
            f"{source} has other weights ({found}) than this run was started with ({stage.fingerprint}); restore those, or start "
            "another run"
        )


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
    fingerprint = fingerprint_of(weights)
    _check_fingerprint(f"{flag}: checkpoint {step}", stage, fingerprint)
    log.info("stage %s: %s of %s at step %d, weights %s", name, trained.method, stage.workdir, step, fingerprint)
    weights["mutable"] = {**weights["mutable"], **frozen}
    return {"config": trained, "step": step, "fingerprint": fingerprint}, weights


def _initial(config, frozen: Mapping) -> dict:
    """The weights of a run before its first step, from its seed."""
    return initial_weights(build_method(config), config.seed, frozen)


def initial_weights(method: Method, seed: int, frozen: Mapping) -> dict:
    """{'params', 'mutable'} of a method before its first step, NumPy."""
    batch = {name: np.zeros((8, *spec.shape), spec.dtype) for name, spec in method.inputs.items()}
    params, mutable = jax.device_get(jax.jit(method.init)(jax.random.key(seed), batch, dict(frozen)))
    return {"params": params, "mutable": {**mutable, **frozen}}
