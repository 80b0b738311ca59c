"""Reads of checkpoints: what is damaged, and what a disk or the network cannot read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from ssl_jax.engine.checksums import Corrupt, verify_named
from ssl_jax.engine.processes import gather
from ssl_jax.engine.sharding import leaf_names
from ssl_jax.errors import MachineFault, machine_fault

PART = 2**28  # bytes


def read_together(folder: Path, read: Callable, message: str):
    """`read()` in every process. If it fails in one, all raise Corrupt; otherwise the others would wait for that one forever.

    Raises:
        Corrupt: with `message` in the process that failed.
        MachineFault: the disk or the network cannot read `folder`.
        JaxRuntimeError, MemoryError: a device or memory failed, which says nothing about the checkpoint.
    """
    value = failure = None
    try:
        value = read()
    except Exception as error:  # noqa: BLE001  Orbax, TensorStore, JSON and zstd raise types of their own
        raise_fault(folder, error)
        failure = error
    failed = [process for process, has_failed in enumerate(gather(failure is not None)) if has_failed]
    if failed:
        raise Corrupt(f"{message} ({first_line(failure)})" if failure else f"process {failed[0]} cannot read it") from failure
    return value


def raise_fault(folder: Path, error: Exception) -> None:
    """Return only if `error` says that the content of `folder` is damaged, whose files can all be read.

    Raises:
        MachineFault: a disk or the network failed.
        JaxRuntimeError, MemoryError: `error` itself.
    """
    if isinstance(error, (jax.errors.JaxRuntimeError, MemoryError)):
        raise error
    fault = machine_fault(error) or machine_fault(_unreadable(folder))
    content = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    if fault is None and isinstance(error, OSError) and not isinstance(error, content):
        fault = error
    if fault is not None:
        raise MachineFault(f"checkpoint {folder} cannot be read, and stays where it is: {fault}") from error


def _unreadable(folder: Path) -> OSError | None:
    """The first error of reading every file below `folder`."""
    found: list[OSError] = []
    for where, _, names in os.walk(folder, onerror=found.append):
        for name in names:
            try:
                with open(Path(where, name), "rb") as file:
                    while file.read(2**24):
                        pass
            except OSError as error:
                found.append(error)
    return next((error for error in found if machine_fault(error)), None)


def check_step(step: int, state: Mapping) -> None:
    if int(state["step"]) != step:
        raise Corrupt(f"it holds step {int(state['step'])}")


def read_back(folder: Path, tree, sums: Mapping[str, int], part: int = PART) -> None:
    """Compare the checkpoint in `folder` with the arrays that were saved.

    Args:
        sums: their checksums.
        part: bytes to read at a time, since the devices may not hold a second copy of all.

    Raises:
        Corrupt, and any error of Orbax, TensorStore and JSON: it cannot be read or differs.
    """
    leaves, structure = jax.tree.flatten(tree)
    names, parts = leaf_names(tree), []
    for i, leaf in enumerate(leaves):
        if not parts or sum(leaves[k].nbytes for k in parts[-1]) + leaf.nbytes > part:
            parts.append([])
        parts[-1].append(i)
    saved = ocp.JsonCheckpointHandler().restore(folder / "checksums", args=ocp.args.JsonRestore())
    if saved != dict(sums):
        raise Corrupt("its checksums are not those that were written")
    handler = ocp.PyTreeCheckpointHandler()
    for chosen in parts:
        wanted = structure.unflatten([leaf if i in chosen else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)])
        how = jax.tree.map(_restore_args, wanted)
        read = jax.tree.leaves(handler.restore(folder / "state", args=ocp.args.PyTreeRestore(item=wanted, restore_args=how)))
        verify_named({names[i]: read[i] for i in chosen}, sums)


def _restore_args(leaf) -> ocp.RestoreArgs:
    if not isinstance(leaf, jax.Array):  # a placeholder, or an array of the host
        return ocp.RestoreArgs(restore_type=None if leaf is ocp.PLACEHOLDER else np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def first_line(error: BaseException) -> str:
    """Type and first line of an error. A long line loses its middle, since TensorStore names the cause at the end."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: " + (line if len(line) <= 200 else f"{line[:90]} ... {line[-90:]}")
