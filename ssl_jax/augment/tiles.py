"""Tiles and patches of images, their places, and the pairs of neighbors among them.

Jigsaw puzzles (Noroozi and Favaro 2016, arXiv:1603.09246), relative places (Doersch et al. 2015, arXiv:1505.05192), co-occurrence
(Isola et al. 2016, arXiv:1511.06811) and CPC (van den Oord et al. 2018, arXiv:1807.03748). The batch is the outermost axis, so that
[B, N, h, w, C] -> [B N, h, w, C] keeps the images of a device on it. For operations on each patch see `views.make_patch_views`,
for puzzles `permutations.permute`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment.geometry import shift_crop
from ssl_jax.augment.pixels import to_float
from ssl_jax.errors import UserError

# Direction of a neighbor, 0 to 7 row by row -> its (row, column) from the center. Opposite directions add up to 7.
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def tiles(images: jax.Array, key: jax.Array, grid: int, size: int, jitter: int = 0) -> tuple[jax.Array, jax.Array]:
    """One tile at a random place of each cell of a grid: the pieces of a puzzle, or patches with gaps.

    images: uint8, or float in [0, 1], [B, H, W, C]. Its grid x grid cells have H // grid x W // grid pixels; what is left over lies
    at the border. Returns (tiles float32 [B, grid^2, size, size, C], row by row; corners int32 [B, grid^2, 2], the row and column
    of the top left pixel of each in the image).

    Each tile has jitter + 1 equally likely places along each axis, around the center of its cell. So cell - size pixels lie
    between neighbors on average, and cell - size - jitter at least, which keeps a network from matching edges. Noroozi's puzzle of
    255 pixels has grid 3, size 64, jitter 21; Doersch's patches of 432 pixels grid 3, size 96, jitter 14. Example i of the batch
    draws with fold_in(key, i). Raises UserError if tile and jitter are larger than a cell.
    """
    height, width, channels = images.shape[1:]
    cell = np.array([height // grid, width // grid])
    if size < 1 or jitter < 0 or size + jitter > min(cell):
        raise UserError(
            f"tiles of {size} pixels with a jitter of {jitter} do not fit images of {height} x {width} pixels, whose {grid} x {grid} "
            f"cells have {cell[0]} x {cell[1]}; use smaller tiles, less jitter, or larger images"
        )
    border = (np.array([height, width]) - grid * cell) // 2
    cells = to_float(images)[:, border[0] : border[0] + grid * cell[0], border[1] : border[1] + grid * cell[1]]
    cells = cells.reshape(-1, grid, cell[0], grid, cell[1], channels).swapaxes(2, 3)
    cells = cells.reshape(-1, grid**2, cell[0], cell[1], channels)
    keys = jax.vmap(lambda example: jax.random.fold_in(key, example))(jnp.arange(len(images)))
    places = jax.vmap(lambda k: jax.random.randint(k, (grid**2, 2), 0, jitter + 1))(keys) + (cell - size - jitter) // 2
    if jitter:
        cut = jax.vmap(jax.vmap(lambda image, place: shift_crop(image, place[0], place[1], size)))(cells, places)
    else:
        top, left = (cell - size) // 2
        cut = cells[:, :, top : top + size, left : left + size]
    origin = np.stack(np.meshgrid(*(np.arange(grid) * c for c in cell), indexing="ij"), -1).reshape(-1, 2) + border
    return cut, places + origin.astype(np.int32)


def grid_patches(images: jax.Array, size: int, stride: int) -> jax.Array:
    """Images [B, H, W, C] -> patches [B, rows, columns, size, size, C], `stride` pixels apart, which overlap if stride < size.

    rows = (H - size) // stride + 1. CPC cuts 256 pixels into 7 x 7 patches of 64 with stride 32; its second version 260 pixels into
    6 x 6 patches of 80 with stride 36. Pixels left over lie at the border. Raises UserError if a patch does not fit.
    """
    height, width = images.shape[1:3]
    if not 1 <= size <= min(height, width) or stride < 1:
        raise UserError(
            f"patches of {size} pixels with stride {stride} do not fit images of {height} x {width} pixels; use a size from 1 to "
            f"{min(height, width)} and a stride of 1 or more"
        )
    rows, columns = ((side - size) // stride + 1 for side in (height, width))
    top, left = (height - size) % stride // 2, (width - size) % stride // 2
    lines = [images[:, top + r * stride :][:, :size] for r in range(rows)]
    lines = jnp.stack(lines, axis=1)  # [B, rows, size, W, C]
    return jnp.stack([lines[:, :, :, left + c * stride :][:, :, :, :size] for c in range(columns)], axis=2)


def join_patches(x: jax.Array) -> jax.Array:
    """What a network says of the patches of a grid, as one layer of the image.

    Maps [B, rows, columns, h, w, C] lie side by side, [B, rows h, columns w, C]. Tokens [B, rows, columns, N, C] become one list,
    [B, rows columns N, C]. Vectors [B, rows, columns, C] are averaged, [B, C].
    """
    batch, rows, columns, *own = x.shape
    if len(own) == 3:
        return x.swapaxes(2, 3).reshape(batch, rows * own[0], columns * own[1], own[2])
    return x.reshape(batch, -1, own[-1]) if len(own) == 2 else jnp.mean(x, (1, 2))


def neighbor_pairs(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, direction), int32 [P]: all ordered pairs of neighbors, also diagonal ones, of a grid numbered row by row.

    `direction`, 0 to 7, is where the second lies from the first (see DIRECTIONS); that of the swapped pair is 7 - direction. A
    3 x 3 grid has 40 pairs; the 8 with first == 4 are those of the center.
    """
    pairs = [
        (row * columns + column, (row + down) * columns + column + right, direction)
        for row in range(rows)
        for column in range(columns)
        for direction, (down, right) in enumerate(DIRECTIONS)
        if 0 <= row + down < rows and 0 <= column + right < columns
    ]
    return tuple(np.array(pairs, np.int32).reshape(-1, 3).T)


def standardize(images: jax.Array, per_channel: bool = False, epsilon: float = 1e-6) -> jax.Array:
    """Each of the float images [..., H, W, C] with mean 0 and standard deviation 1 over its pixels and channels, or per channel.

    Against the shortcut of comparing the brightness of patches. An image of one color becomes 0. `epsilon` is added to the variance;
    pixels are in [0, 1], where a gray level of 256 has 1.5e-5. Per channel, a channel that `drop_colors` filled becomes noise of
    full strength.
    """
    axes = (-3, -2) if per_channel else (-3, -2, -1)
    centered = images - jnp.mean(images, axis=axes, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(centered**2, axis=axes, keepdims=True) + epsilon)
