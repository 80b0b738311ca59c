"""The device groups of a collective, and the mesh axes that they cover."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

_LISTED = re.compile(r"replica_groups=\{(.*?\}|)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?\}|)\}")
_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")  # an axis, or its sub-axis of `size` after a major part of size `pre`


def device_groups(line: str, devices: int) -> np.ndarray:
    """Device ids [groups, size] of an HLO instruction; for a permutation [pairs, 2] (source, target).

    Raises:
        ValueError: the groups have an unknown format.
    """
    if match := _PAIRS.search(line):
        return _lists(match[1])
    if match := _LISTED.search(line):
        return _lists(match[1]) if match[1] else np.arange(devices)[None]
    if match := _IOTA.search(line):
        return _iota(match[2], match[3]).reshape(_numbers(match[1]))
    if match := _MESH.search(line):
        return _mesh_groups(match)
    if "replica_groups" in line:
        raise ValueError(f"replica groups in an unknown form: {line}")
    return np.arange(devices)[None]


def mesh_axes(groups: np.ndarray, mesh: Mapping[str, int]) -> str:
    """The axes along which the devices of a group differ, as 'data+fsdp'; 'part of ...' if a group does not cover whole axes."""
    places = np.unravel_index(groups, tuple(mesh.values()))
    along = [axis for axis, place in zip(mesh, places, strict=True) if (place != place[:, :1]).any()]
    whole = groups.shape[1] == math.prod(mesh[axis] for axis in along)
    return ("" if whole else "part of ") + ("+".join(along) or "one device")


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


def _lists(text: str) -> np.ndarray:
    return np.array([_numbers(group) for group in re.findall(r"\{(.*?)\}", text + "}")])


def _iota(shape: str, order: str | None) -> np.ndarray:
    """For '[2,4]<=[4,2]T(1,0)': np.arange(8) as [4, 2], transposed."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _mesh_groups(match: re.Match) -> np.ndarray:
    """mesh['a'=4,'b'=2] {'a'}: groups along 'a', one per index of 'b'. {'a':(2)2}: groups along the minor factor of 'a' = 2 x 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", match[1])}
    ids = _iota(match[2], match[3]) if match[2] else np.arange(math.prod(sizes.values()))
    factors, inside = [], []
    parts = {name: (int(pre or 1), int(size or sizes[name])) for name, pre, size in _AXIS.findall(match[4])}
    for name, size in sizes.items():
        pre, part = parts.get(name, (size, 1))
        factors += [pre, part, size // (pre * part)]
        inside += [False, name in parts, False]
    ids = ids.reshape(factors)
    outer, inner = ([d for d, within in enumerate(inside) if within == wanted] for wanted in (False, True))
    return ids.transpose(outer + inner).reshape(-1, math.prod(factors[d] for d in inner))
