"""card.json: description, input and metrics of an exported function, and checksums of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ssl_jax.engine.backbone import encoder_model
from ssl_jax.engine.checkpoint import write_json
from ssl_jax.engine.records import read_json
from ssl_jax.engine.renamed_keys import translate
from ssl_jax.errors import UserError
from ssl_jax.export.source import Source, normalization, plain
from ssl_jax.models.pretrained.weights_file import refused
from ssl_jax.version import VERSION

CARD, SCHEMA = "card.json", 1
LONGEST = 1 << 15  # pixels of a side of an image
REMEDY = "export again"
REQUIRED = {"schema": int, "format": str, "method": str, "config": dict, "input": dict, "features": dict, "step": int, "files": dict,
            "encoder": (dict, type(None)), "stablehlo": (dict, type(None))}  # fmt: skip


def make_card(form: str, source: Source, features: Mapping[str, jax.Array], about: Mapping[str, Any]) -> dict[str, Any]:
    """The card without the entry 'files'.

    Args:
        features: outputs of this form for the probe images.
        about: 'step', 'total_steps', 'metrics', 'protocols', 'versions', and 'vocabulary' of a run that reads texts.
    """
    mean, std = normalization(source.config)
    then = {"then": source.method.reads} if source.method.reads else {"then": "(x - mean) / std", "mean": mean, "std": std}
    height, width, _ = source.image_shape
    return {
        "schema": SCHEMA,
        "format": form,
        "method": source.config.method,
        "encoder": plain(encoder_model(source.config)).get("encoder"),
        "step": about["step"],
        "total_steps": about["total_steps"],
        "input": {
            "layout": ["batch", "height", "width", "channel"],
            "dtype": "uint8",
            "color_space": "RGB",
            "range": [0, 255],
            "height": height,
            "width": width,
            "free": ["batch", "height", "width"] if form == "safetensors" else ["batch"],
            "normalization": {"scale": "x / 255", **then, "applied_by": "encode"},
        },
        "features": {name: ["b", *value.shape[1:]] for name, value in features.items()},
        "compute_dtype": source.config.dtype,
        "metrics": about["metrics"],
        "protocols": about["protocols"],
        "vocabulary": about.get("vocabulary", {}),
        "data": {name: source.config.data.get(name) for name in ("name", "train_split", "test_split")},
        "license": None,
        "versions": {"ssl_jax": VERSION, **about["versions"]},
        "config": plain(source.config),
    }  # fmt: skip


def seal(folder: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Write the card, with size and SHA-256 of every file in `folder`; returns it as written."""
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in _files(folder).items()}
    write_json(folder / CARD, {**card, "files": files})
    return json.loads((folder / CARD).read_text())


def open_card(folder: Path) -> dict[str, Any]:
    """Read and check the card of an export; its config gets the keys of this version.

    Raises:
        UserError: no card, an invalid card, or files that differ from the card's checksums or list.
    """
    path = folder / CARD
    if not path.is_file():
        raise UserError(f"{folder} holds no export (no {CARD}); give the folder that `launch.py export` wrote")
    card = read_json(path, dict, REQUIRED, REMEDY)
    if card["schema"] != SCHEMA:
        raise UserError(
            f"{path} has schema {card['schema']!r} and this ssl_jax reads {SCHEMA}; use the version that wrote it"
        )
    if problem := _problem(card):
        raise UserError(f"{path} is damaged ({problem}); {REMEDY}")
    present = _files(folder)  # names in the card are only compared with these, so they cannot point outside the folder
    for name, expected in card["files"].items():
        if name not in present:
            raise UserError(f"{folder} has no {name!r}, which its card lists; copy the whole folder or export again")
        if sha256(present[name]) != expected["sha256"]:
            raise UserError(f"{present[name]} is damaged: its SHA-256 differs from the card; copy or export it again")
    extra = sorted(set(present) - set(card["files"]))
    if extra:
        raise UserError(
            f"{folder} has {extra[0]!r}, which its card does not list; keep each export in its own folder"
        )
    return {**card, "config": translate(card["config"])}


def _problem(card: Mapping) -> str:
    """What is wrong with the entries of a card, or ''."""
    sides = [card["input"].get(side) for side in ("height", "width")]
    if not all(type(side) is int and 0 < side <= LONGEST for side in sides):
        return f"images of {sides[0]} x {sides[1]}"
    free = card["input"].get("free")
    if not isinstance(free, list) or not all(isinstance(name, str) for name in free):
        return "input has no list 'free'"
    for name, shape in card["features"].items():
        rest = shape[1:] if isinstance(shape, list) and shape[:1] == ["b"] else [0]
        if not all(type(side) is int and side > 0 for side in rest):
            return f"feature {name!r} has shape {shape}"
    odd = [name for name, file in card["files"].items() if not isinstance(file, dict) or not isinstance(file.get("sha256"), str)]
    return f"file {odd[0]!r} has no SHA-256" if odd else ""


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with refused(path, "no readable file"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """{name in the card: path} of every file below `folder`, except the card."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths.pop(CARD, None)
    return paths
