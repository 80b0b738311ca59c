"""`pictures/neighbors.png`: test images beside the training images with the most similar features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ssl_jax.engine.pictures import grid, save_png
from ssl_jax.evals.context import Context, OpenBatches
from ssl_jax.evals.kinds.knn import neighbors

SIZE, BORDER, STRIP = 112, 4, 18  # pixels: longer side of a picture, its frame, the line of text below it
QUERY, SAME, OTHER, UNKNOWN = (30, 30, 30), (38, 140, 70), (200, 50, 45), (150, 150, 150)


def save_neighbors(context: Context, open_batches: OpenBatches, path: Path, queries: int = 8, k: int = 6) -> None:
    """Write a row per query: the test image, then its `k` nearest images of the bank (cosine of 'pooled'), best first.

    The queries lie evenly over the test split. The similarity stands below each neighbor. Its frame is green, with the text 'same',
    where it has the label of the query, and red, with 'other', where not; gray where the data has no labels.

    Every process calls this; process 0 reads the images and writes.

    Args:
        open_batches: opens the splits of `context`, unaugmented and whole in one process.
        queries: rows.
        k: neighbors per row.
    """
    bank, query = context.features("bank"), context.features("test")
    rows = np.unique(np.linspace(0, len(query.x) - 1, min(queries, len(query.x))).round().astype(int))
    index, similarity = neighbors(bank.x, query.x[rows], min(k, len(bank.x)), mesh=context.mesh)
    if jax.process_index() != 0:
        return
    query_images = fetch_images(open_batches("test"), rows, len(query.x))
    bank_images = fetch_images(open_batches(context.own("bank")), index.ravel(), len(bank.x))
    labeled = bank.y.min() >= 0 and len(np.unique(bank.y)) > 1
    tiles = []
    for row, places, values in zip(rows, index, similarity, strict=True):
        tiles.append(_tile(query_images[row], "query", QUERY))
        for place, value in zip(places, values, strict=True):
            same = np.array_equal(bank.y[place], query.y[row])
            color, relation = ((SAME, " same") if same else (OTHER, " other")) if labeled else (UNKNOWN, "")
            tiles.append(_tile(bank_images[place], f"{value:.3f}{relation}", color))
    tiles = np.stack(tiles).reshape(len(rows), 1 + index.shape[1], *tiles[0].shape)
    save_png(grid(tiles, gap=3), path, optimize=True)


def fetch_images(batches: Iterable[Mapping[str, np.ndarray]], rows: np.ndarray, count: int) -> dict[int, np.ndarray]:
    """{row: uint8 [H, W, 3]}, the images behind the feature rows `rows`.

    Valid examples have a feature row each, `count` in all. Where the batches can be indexed and all examples are valid, only the
    batches of wanted rows are read; otherwise all are read in order, up to the last wanted row.
    """
    wanted = np.unique(rows)
    if getattr(batches, "num_examples", None) == count:
        size = batches.batch_size
        stream = ((number * size, batches[number]) for number in np.unique(wanted // size).tolist())
    else:
        stream = _counted(batches)
    images = {}
    for first, batch in stream:
        pictures = batch["image"][np.asarray(batch["_valid"], bool)]
        for row in wanted[(wanted >= first) & (wanted < first + len(pictures))].tolist():
            images[row] = np.array(pictures[row - first])
        if len(images) == len(wanted):
            return images
    raise ValueError(f"the split ended before row {wanted[-1]}; open_batches must open the split of the features")


def _counted(batches):
    """(features before this batch, batch) of each batch."""
    first = 0
    for batch in batches:
        yield first, batch
        first += int(np.sum(np.asarray(batch["_valid"], bool)))


def _tile(image: np.ndarray, text: str, color: tuple[int, int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [SIZE + 2 BORDER + STRIP, SIZE + 2 BORDER, 3]: framed, with a line of text below."""
    scale = SIZE / max(image.shape[:2])
    size = tuple(max(1, round(n * scale)) for n in (image.shape[1], image.shape[0]))
    picture = Image.fromarray(image).resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIZE + 2 * BORDER, SIZE + 2 * BORDER + STRIP), "white")
    canvas.paste(color, (0, 0, SIZE + 2 * BORDER, SIZE + 2 * BORDER))
    canvas.paste(picture, (BORDER + (SIZE - size[0]) // 2, BORDER + (SIZE - size[1]) // 2))
    place, font = (canvas.width // 2, canvas.height - STRIP // 2), ImageFont.load_default(13)
    ImageDraw.Draw(canvas).text(place, text, fill=color, font=font, anchor="mm")
    return np.asarray(canvas)
