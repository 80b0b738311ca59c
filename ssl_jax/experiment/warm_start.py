"""Start from the weights of another run or of others, by explicit rules, and log what was copied and what was not."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.engine.checkpoint import Checkpoints
from ssl_jax.engine.method import State
from ssl_jax.engine.sharding import leaf_names, put_global
from ssl_jax.errors import UserError
from ssl_jax.experiment.stages import foreign_weights
from ssl_jax.models.backbones.vit import resize_positions
from ssl_jax.models.pretrained.foreign import read_encoder

log = logging.getLogger(__name__)


def warm_start(state: State, workdir: str, rules: Sequence[tuple[str, str]]) -> State:
    """Copy leaves of the newest checkpoint of `workdir`, or of the encoder in a file of weights, into `state`.

    Args:
        workdir: of a run; or a file that `models.pretrained.foreign` reads, whose parameters are 'net/encoder/...'.
        rules: (regex, replacement) pairs on names 'group/module/leaf'. The first regex that matches a leaf of the checkpoint gives
            its name in `state`. Batch statistics follow the same rules as if they were in group 'net'.

    Learned positions of a ViT are interpolated where the grids of patches differ, as in its forward pass.

    Raises:
        UserError: no checkpoint, a rule that copies nothing, a leaf whose shapes differ, or one of a file that `state` lacks.
    """
    from_file = Path(workdir).is_file()
    source, where = _of_file(workdir) if from_file else _of_run(workdir)
    used: set[str] = set()
    params, taken = _copy(state.params, source["params"], rules, used, "")
    stats, taken_stats = _copy(
        state.mutable.get("batch_stats", {}), source["mutable"].get("batch_stats", {}), rules, used, "net/"
    )
    idle = [pattern for pattern, _ in rules if pattern not in used]
    if idle:
        raise UserError(f"config.warm_start.rules: {idle[0]!r} takes nothing from {workdir}; names there are like "
                        f"{leaf_names(source['params'])[0]!r}")  # fmt: skip
    if from_file:
        _check_all_taken(workdir, source, state, rules)
    fresh = sorted(set(leaf_names(state.params)) - set(taken))
    log.info(
        "warm start from %s: %d parameters and %d statistics taken; %d stay fresh%s",
        where, len(taken), len(taken_stats), len(fresh), f" ({', '.join(fresh[:4])}, ...)" if fresh else "",
    )  # fmt: skip
    mutable = {**state.mutable, "batch_stats": stats} if "batch_stats" in state.mutable else state.mutable
    return state._replace(params=params, mutable=mutable)


def _of_run(workdir: str) -> tuple[dict, str]:
    """({'params', 'mutable'}, its name for the log)."""
    saved = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    steps = saved.agreed_steps()
    if not steps:
        raise UserError(
            f"config.warm_start.workdir={workdir} has no checkpoint; give the directory of a run that saved one, or a file of weights"
        )
    source = saved.read(steps[-1])
    saved.close()
    return source, f"{workdir} step {steps[-1]}"


def _of_file(path: str) -> tuple[dict, str]:
    encoder = read_encoder(path)
    return foreign_weights(encoder), f"{path} (which saw channels with mean {encoder.mean}, std {encoder.std})"


def _check_all_taken(path: str, source: Mapping, state: State, rules) -> None:
    """Raises UserError if a rule applies to an array of a file, and `state` has no place for it: it has another encoder."""
    stats = source["mutable"]["batch_stats"], state.mutable.get("batch_stats", {})
    for (tree, here), prefix in (((source["params"], state.params), ""), (stats, "net/")):
        there = set(leaf_names(here))
        for name in leaf_names(tree):
            found = _renamed(prefix + name, rules)
            if found is not None and found[1].removeprefix(prefix) not in there:
                raise UserError(
                    f"config.warm_start.workdir={path} has {prefix}{name}, and this model no {found[1]}; give the encoder of the file "
                    "in config.model.encoder, or rules that leave it out"
                )


def _renamed(name: str, rules) -> tuple[str, str] | None:
    """(the first pattern that matches, the new name); None where no rule does."""
    for pattern, replacement in rules:
        new, hits = re.subn(pattern, replacement, name, count=1)
        if hits:
            return pattern, new
    return None


def _copy(tree, source, rules, used, prefix):
    """(`tree` with leaves of `source` put in place, the names that were copied)."""
    values = dict(zip(leaf_names(source), jax.tree.leaves(source), strict=True))
    renamed, here = {}, set(leaf_names(tree))
    for name, value in values.items():
        found = _renamed(prefix + name, rules)
        if found is not None:
            renamed[found[1].removeprefix(prefix)] = value
            if found[1].removeprefix(prefix) in here:
                used.add(found[0])
    names, leaves = leaf_names(tree), jax.tree.leaves(tree)
    out, taken = [], []
    for name, leaf in zip(names, leaves, strict=True):
        if name in renamed:
            if name.endswith("/pos_embed") and renamed[name].shape != leaf.shape:
                renamed[name] = positions(np.asarray(renamed[name]), leaf, prefix + name)
            if renamed[name].shape != leaf.shape:
                raise UserError(
                    f"warm start: {prefix}{name} has shape {leaf.shape} here and {renamed[name].shape} there; "
                    "use the same model fields, or a rule that leaves it out"
                )
            taken.append(prefix + name)
            leaf = put_global(np.asarray(renamed[name]), leaf.sharding)
        out.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(tree), out), taken


def positions(table: np.ndarray, here, name: str) -> np.ndarray:
    """Learned positions [1, N, D] for the grid of `here` [1, M, D]. The row of a class token, if any, is not interpolated.

    `table` itself is returned if the numbers of rows say nothing of two square grids, or the widths differ.
    """
    sides = [_side(x.shape) for x in (table, here)]
    if None in sides or table.shape[-1] != here.shape[-1]:
        return table
    (old, tokens_there), (new, tokens_here) = sides
    patches = np.asarray(resize_positions(jnp.asarray(table[:, tokens_there:]), (new, new)))
    tokens = table[:, :tokens_there] if tokens_there >= tokens_here else np.asarray(here[:, :tokens_here])
    log.info("%s: positions of %d x %d patches interpolated to %d x %d", name, old, old, new, new)
    return np.concatenate([tokens[:, :tokens_here], patches], 1)


def _side(shape) -> tuple[int, int] | None:
    """(side of the square grid of patches, 1 with a class token or else 0) of positions [1, N, D]; None if N is neither."""
    if len(shape) != 3:
        return None
    return next(((math.isqrt(shape[1] - k), k) for k in (0, 1) if math.isqrt(shape[1] - k) ** 2 == shape[1] - k), None)
