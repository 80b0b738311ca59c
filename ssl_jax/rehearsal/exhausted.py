"""What the compiler of TPUs says of a program that does not fit into the memory of its chips."""

from __future__ import annotations

import re

# A program that is far too large is refused before its buffers are placed: the second form, which names none.
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm|\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_BUFFER = re.compile(r"^\s*\d+\. Size: ([\d.]+)([KMGT])$(.*?)^\s*=+$", re.MULTILINE | re.DOTALL)


def exhausted(message: str, most: int = 5) -> dict | None:
    """{'message': its first line, 'used', 'limit': bytes of a device, 'largest': [{'bytes', 'shape', 'of'}]}; None for another message.

    'largest' are up to `most` buffers that the message lists, 'of' the operation that makes one, as JAX names it; equal ones once.
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
