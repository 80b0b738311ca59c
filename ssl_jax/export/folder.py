"""Write an export atomically, and load one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssl_jax import files
from ssl_jax.data.vocabulary import Tokenizer, from_json
from ssl_jax.engine.orbax_paths import check_text
from ssl_jax.errors import MachineFault, UserError, machine_fault
from ssl_jax.export.card import CARD, make_card, open_card, seal
from ssl_jax.export.formats import FORMATS, TASKS, Functions, compare_tasks
from ssl_jax.export.program import described
from ssl_jax.export.source import TOLERANCES, Source, difference, plain

WRITING, OLD = ".writing-", ".old-"  # in the names of folders beside an export while it is written


def write(folder: Path, form: str, source: Source, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write `source` in one of FORMATS to a temporary folder, read it back, compare on two images, then rename it to `folder`.

    Args:
        folder: created, or replaced if it is an export.
        about: the run's 'step', 'total_steps', 'metrics', 'protocols', 'versions', for the card.

    Returns:
        The card.

    Raises:
        UserError: the folder cannot be there or is no export, or another process writes it. NoTorchLayout: see `formats`.
        MachineFault: its disk fails.
    """
    folder = Path(folder).absolute()
    check_text(folder)
    if folder.exists() and not (folder / CARD).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an export; choose another --output")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _clean(folder)
            return _write(folder, form, source, about)
    except BlockingIOError:
        raise UserError(f"{folder} is being written by another process; wait for it, or choose another --output") from None
    except Exception as error:  # TensorStore and safetensors report a full disk by types of their own; others are raised again
        fault = machine_fault(error)
        if fault is not None:
            raise MachineFault(f"{folder} cannot be written: {fault}") from error
        if isinstance(error, OSError):
            raise UserError(f"{folder} cannot be written ({error.strerror or error}); choose another --output") from error
        raise


def _write(folder: Path, form: str, source: Source, about: Mapping[str, Any]) -> dict[str, Any]:
    writer, reader = FORMATS[form]
    building = folder.with_name(f".{folder.name}{WRITING}{os.getpid()}")
    try:
        building.mkdir()
        fields = writer(building, source)
        functions = reader(building, {"config": plain(source.config)})
        features = functions["encode"](source.probe)
        error = difference(jax.device_get(features), source.expected)
        assert error <= TOLERANCES[source.config.dtype], f"the {form} form differs from the method by {error:.1e}"
        if "tokens" in functions:
            tokens = jax.jit(source.method.fns.tokens)(source.params, source.mutable, source.probe)
            changed = float(np.mean(np.asarray(functions["tokens"](source.probe)) != np.asarray(tokens)))
            assert changed <= 0.01, f"{changed:.0%} of the tokens of the {form} form differ"  # rounding may decide near ties
        if tasks := compare_tasks(functions, source):
            fields = {**fields, "tasks": tasks}
        card = {**make_card(form, source, features, about), "largest_difference": error, **fields}
        card = seal(building, card)
        _put_in_place(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return card


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process writes `folder`. Raises BlockingIOError where another one does."""
    path = folder.with_name(f".{folder.name}.lock")
    lock = files.lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def _clean(folder: Path) -> None:
    """Remove what killed exports have left, whose process ids may be used again. An old export that was moved away comes back."""
    for path in folder.parent.iterdir():
        if path.name.startswith((f".{folder.name}{WRITING}", f".{folder.name}{OLD}")):
            if OLD in path.name and (path / CARD).is_file() and not folder.exists():
                os.replace(path, folder)
            else:
                shutil.rmtree(path)


def _put_in_place(building: Path, folder: Path) -> None:
    """Rename `building` to `folder`. A rename cannot replace a non-empty folder, so an old export moves away first."""
    old = folder.with_name(f".{folder.name}{OLD}{os.getpid()}")
    if folder.exists():
        os.replace(folder, old)
    files.put(building, folder)
    shutil.rmtree(old, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A loaded export. Call it with images to get features; `card` is the content of card.json."""

    card: Mapping[str, Any]
    functions: Functions = dataclasses.field(repr=False)

    def __call__(self, images: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """uint8 RGB [B, H, W, 3] -> {'pooled': [B, D], ...}. Raises UserError for other images."""
        check_images(images, self.card["input"])
        return self.functions["encode"](images)

    def tokens(self, images: np.ndarray | jax.Array) -> jax.Array:
        """uint8 RGB [B, H, W, 3] -> int32 [B, h, w]. Raises UserError for other images, and if the export is no tokenizer."""
        check_images(images, self.card["input"])
        return self._function("tokens")(images)

    def decode(self, tokens: np.ndarray | jax.Array) -> jax.Array:
        """int32 [B, h, w] -> float32 [B, H, W, 3] in [0, 1]. Raises UserError if the export is no tokenizer."""
        return self._function("decode")(tokens)

    def segment(self, images: np.ndarray | jax.Array) -> jax.Array:
        """uint8 RGB [B, H, W, 3] -> float32 logits [B, H, W, classes]. Raises UserError for other images, and for other exports."""
        check_images(images, self.card["input"])
        return self._function("segment", "a run of configs/segmentation.py")(images)

    def detect(self, images: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """uint8 RGB [B, H, W, 3] -> boxes, scores and labels as `ModelFns.detect` gives them.

        Raises UserError for other images, and for other exports.
        """
        check_images(images, self.card["input"])
        return self._function("detect", "a run of configs/detection.py")(images)

    def answer(self, images: np.ndarray | jax.Array, questions: Sequence[str]) -> dict[str, jax.Array]:
        """uint8 RGB [B, H, W, 3] and B questions -> logits and attention as `ModelFns.answer` gives them.

        `card["vocabulary"]["answer"]["tokens"]` names the answers. Words that the training had not seen count as unknown.
        Raises UserError for other images, for a question that is too long, and for other exports.
        """
        check_images(images, self.card["input"])
        function = self._function("answer", "a run of configs/vqa.py")
        read = Tokenizer(from_json(self.card["vocabulary"])["question"])
        length = self.card["tasks"]["answer"]["takes"]["question"][-1]
        return function({"image": images, "question": np.stack([read(text, length, f"question {text!r}") for text in questions])})

    def _function(self, name, what="a tokenizer"):
        if name not in self.functions:
            method = self.card["config"]["method"]
            raise UserError(f"this export of {method!r} has no function {name!r}; export {what} as orbax or stablehlo")
        return self.functions[name]


def load(path: str | Path) -> Encoder:
    """The encoder of an export in any form; `path` is its folder or a file in it.

    Raises:
        UserError: no export, damaged files, or a program that this JAX cannot run.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    card = open_card(folder)
    if card["format"] not in FORMATS:
        raise UserError(f"{folder} is of format {card['format']!r}; this ssl_jax reads {', '.join(FORMATS)}")
    try:
        functions = FORMATS[card["format"]][1](folder, card)
        images = jax.ShapeDtypeStruct((2, card["input"]["height"], card["input"]["width"], 3), np.uint8)
        found = jax.eval_shape(functions["encode"], images)
        found = {name: ["b", *value.shape[1:]] for name, value in found.items()}
        if found != card["features"]:
            raise ValueError(f"features {found}, not {card['features']}")
        for name in (name for name in TASKS if name in functions):
            listed = card["tasks"][name]
            takes = {key: jax.ShapeDtypeStruct((2, *sides), kind) for key, (kind, _, *sides) in listed["takes"].items()}
            found = described(jax.eval_shape(functions[name], takes.get("", takes)))
            if found != listed["gives"]:
                raise ValueError(f"{name!r} gives {found}, not {listed['gives']}")
    except (UserError, MachineFault):
        raise
    except Exception as error:  # the card says what is built, and Orbax and Flax raise types of their own
        cause = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{folder}: the card and the files do not fit ({type(error).__name__}: {cause}); export again") from error
    return Encoder(card, functions)


def check_images(images: Any, expected: Mapping[str, Any]) -> None:
    """Raises UserError, with the remedy, unless `images` match the card's 'input'."""
    height, width = expected["height"], expected["width"]
    free = set(expected["free"])
    size = f"{'H' if 'height' in free else height}, {'W' if 'width' in free else width}"
    wanted = f"encode takes uint8 RGB images [B, {size}, 3] with values 0 .. 255"
    if not isinstance(images, np.ndarray | jax.Array):
        raise UserError(f"{wanted}, not a {type(images).__name__}; convert it with numpy.asarray")
    shape = images.shape
    problem = f"{wanted}, not {images.dtype} {list(shape)}"
    if len(shape) == 3 and shape[-1] == 3:
        raise UserError(f"{problem}; add the batch axis: images[None]")
    if len(shape) == 3 or (len(shape) == 4 and shape[-1] == 1):
        raise UserError(f"{problem}; grayscale becomes RGB by numpy.repeat(images.reshape(B, H, W, 1), 3, axis=-1)")
    if len(shape) == 4 and shape[-1] == 4:
        raise UserError(f"{problem}; drop the alpha channel: images[..., :3]")
    if len(shape) == 4 and shape[-1] != 3 and shape[1] == 3:
        raise UserError(f"{problem}; channels come last: images.transpose(0, 2, 3, 1)")
    if len(shape) != 4 or shape[-1] != 3 or shape[0] == 0:
        raise UserError(f"{problem}; give at least one image, channels last")
    if images.dtype != np.uint8:
        scale = "(images * 255).round()" if np.issubdtype(images.dtype, np.floating) else "images"
        raise UserError(f"{problem}; it scales and normalizes itself: {scale}.astype('uint8') if they are pixels")
    if ("height" not in free and shape[1] != height) or ("width" not in free and shape[2] != width):
        raise UserError(
            f"{problem}; resize them, or load the safetensors form, which takes any size that its encoder takes"
        )
