"""Confusion matrices of pixels, summed exactly, and the measures that follow from them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MOST_PIXELS = 2**24  # of an image: float32 counts up to here without rounding


@functools.partial(jax.jit, static_argnums=(2, 3))
def counts(true: jax.Array, found: jax.Array, classes: int, ignore: int) -> jax.Array:
    """float32 [B, classes + 1, classes]: how many pixels of each image have the true class of a row and the found class of a column.

    The last row counts pixels whose true label is neither a class nor `ignore`. Counts are exact up to MOST_PIXELS.

    Args:
        true: integers [B, H, W], classes in [0, classes) or `ignore`.
        found: integers [B, H, W] in [0, classes).
    """
    true, found = (x.reshape(len(x), -1).astype(jnp.int32) for x in (true, found))
    row = jnp.where(true == ignore, -1, jnp.minimum(true, classes))  # -1 is no row
    rows, columns = (jax.nn.one_hot(x, n) for x, n in ((row, classes + 1), (found, classes)))
    return jnp.einsum("bpc,bpd->bcd", rows, columns, preferred_element_type=jnp.float32)  # zeros and ones: exact in any precision


def measures(matrix: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
    """Percentages of a confusion matrix [C, C] with the true classes in rows.

    miou: mean intersection over union of the classes that occur in the true masks. A class that does not occur is left out, also
        where it is found; scikit-learn's macro average counts such a class as 0.
    accuracy: pixels that are right. class_accuracy: mean over the classes that occur of the share of their pixels that are right.
    miou_majority, accuracy_majority: of the answer that every pixel has the most frequent class.
    iou_NAME: of each class that occurs, by `names` or by number.
    """
    matrix = np.asarray(matrix, np.int64)
    right, of_class, found = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    there = of_class > 0
    iou = right[there] / (of_class + found - right)[there]
    majority = of_class.max() / of_class.sum()
    metrics = {
        "miou": iou.mean(),
        "accuracy": right.sum() / of_class.sum(),
        "class_accuracy": (right[there] / of_class[there]).mean(),
        "miou_majority": majority / there.sum(),
        "accuracy_majority": majority,
    }
    for number, value in zip(np.flatnonzero(there).tolist(), iou, strict=True):
        metrics[f"iou_{names[number] if names else number}"] = value
    return {name: 100 * float(value) for name, value in metrics.items()}
