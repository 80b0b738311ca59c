"""Pictures of questions about images: the image, a map of attention over it, the question, the given and the true answer."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, COLUMNS = 128, 8, 4  # pixels of an image and between cells; cells in a row
FONT, LINE, LETTERS = 12, 15, 40  # pixels of letters and lines; letters in a line of a cell
RIGHT, WRONG, PLAIN = (0, 110, 40), (180, 0, 0), (0, 0, 0)


def draw(images: np.ndarray, attention: np.ndarray, texts: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """uint8 [H, W, 3].

    Args:
      images: uint8 [N, h, w, 3].
      attention: float [N, rows, columns], not negative; each map is shown relative to its largest value.
      texts: N times (question, given answer, true answer).
    """
    font = ImageFont.load_default(FONT)
    lines = [textwrap.wrap(question, LETTERS)[:4] for question, _, _ in texts]
    cell = 2 * SIDE + GAP, SIDE + LINE * (max(map(len, lines)) + 2) + GAP
    rows = -(-len(images) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * (cell[0] + GAP) + GAP, rows * (cell[1] + GAP) + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for place, (image, weights, wrapped, (_, given, true)) in enumerate(zip(images, attention, lines, texts, strict=True)):
        left, top = GAP + place % COLUMNS * (cell[0] + GAP), GAP + place // COLUMNS * (cell[1] + GAP)
        pixels = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        canvas.paste(pixels, (left, top))
        canvas.paste(overlay(pixels, weights), (left + SIDE + GAP, top))
        answers = [(f"answer: {given}", RIGHT if given == true else WRONG), (f"true: {true}", PLAIN)]
        for row, (text, color) in enumerate([*((line, PLAIN) for line in wrapped), *answers]):
            pen.text((left, top + SIDE + 2 + row * LINE), text, fill=color, font=font)
    return np.asarray(canvas)


def overlay(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """The image, gray and dark where `weights` [rows, columns] are small, and red where they are large."""
    relative = Image.fromarray((255 * weights / max(weights.max(), 1e-12)).astype(np.uint8))
    heat = np.asarray(relative.resize(image.size, Image.Resampling.BILINEAR), np.float32)[..., None] / 255
    gray = np.asarray(image.convert("L").convert("RGB"), np.float32)
    return Image.fromarray(((1 - 0.7 * heat) * 0.6 * gray + 0.7 * heat * np.array([255, 40, 0])).astype(np.uint8))
