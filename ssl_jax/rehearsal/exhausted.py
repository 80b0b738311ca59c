"""Parses the error message of the TPU compiler for a program that exceeds the memory of a chip."""

from __future__ import annotations

import re

# The second form is for a program that is refused before buffers are allocated; that message lists no buffers.
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm|\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_BUFFER = re.compile(r"^\s*\d+\. Size: ([\d.]+)([KMGT])$(.*?)^\s*=+$", re.MULTILINE | re.DOTALL)


def exhausted(message: str, most: int = 5) -> dict | None:
    """{'message': its first line, 'used', 'limit': bytes per device, 'largest': [{'bytes', 'shape', 'of'}]}; None for other errors.

    'largest' has up to `most` distinct buffers from the message; 'of' is the operation that computes one, as JAX names it.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    used = _USED.search(message)
    found = {"message": message.splitlines()[0], "used": None, "limit": None, "largest": []}
    if used:
        numbers = [part for part in used.groups() if part]
        found |= {"used": _bytes(*numbers[:2]), "limit": _bytes(*numbers[2:])}
    for number, unit, text in _BUFFER.findall(message):
        shape, name = re.search(r"Shape: (\w+\[[\d,]*\])", text), re.search(r'op_name="([^"]*)"', text)
        entry = {"bytes": _bytes(number, unit), "shape": shape[1] if shape else "", "of": name[1] if name else ""}
        if entry not in found["largest"]:
            found["largest"].append(entry)
    found["largest"] = found["largest"][:most]
    return found


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit])
