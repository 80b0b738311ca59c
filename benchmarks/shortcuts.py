"""Shortcuts of tasks on tiles of images: what tiles give away to a program that understands nothing of pictures.

    JAX_PLATFORMS=cpu python benchmarks/shortcuts.py                                           made-up pictures, known faults
    JAX_PLATFORMS=cpu python benchmarks/shortcuts.py --config=configs/jigsaw.py:cifar10_small  the views of a config on its data

Three programs answer questions about the tiles of a 3 x 3 grid. They learn at most a linear classifier.
    edge        which of the 8 other tiles lies to the right? the one whose left column continues the right column (chance 1/8)
    aberration  where in the grid is the tile? from the shifts of red and of blue against green (chance 1/9)
    jpeg        how far apart are two tiles, modulo 8 pixels? from the blocks of a JPEG (chance 1/8)
A network can learn what these programs can: an answer far above chance leaks through the gaps, the colors or the compression.
For co-occurrence two others answer whether neighboring tiles are from one image or from two (chance 1/2), by the differences of
    color       the means of red, green and blue
    texture     the logarithms of contrast and of sharpness along both axes, of gray tiles
Doersch et al. 2015 (arXiv:1505.05192, section 3.1) found the first two, Noroozi and Favaro 2016 (arXiv:1603.09246) list defenses.

The made-up pictures are 1/f noise, whose neighboring pixels are as alike as in photographs. A config has to be of cooccurrence, or of
a method with model.grid=3: relative_patch or jigsaw. Prints a table, and rows for docs/results/robustness.csv.
"""

import argparse
import io
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
import scipy.ndimage
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ssl_jax.augment.tiles import neighbor_pairs, standardize, tiles
from ssl_jax.augment.views import make_patch_views
from ssl_jax.data.catalog import open_data, read_facts
from ssl_jax.data.reader import Reader
from ssl_jax.engine.pretext import one_view
from ssl_jax.errors import UserError
from ssl_jax.experiment.build import fill_in
from ssl_jax.experiment.training import load_config

SMALLEST_FOR_JPEG = 15  # pixels of a tile that has a whole block wherever it starts
ROOT = pathlib.Path(__file__).resolve().parent.parent
GRID, CHANCE = 3, {"edge": 1 / 8, "aberration": 1 / 9, "jpeg": 1 / 8, "color": 1 / 2, "texture": 1 / 2}

# ------------------------------------------------------------------------------------------------- three programs


def edge(cut: np.ndarray, corners: np.ndarray) -> float:
    """Share of the tiles [B, 9, h, w, 3] with a right neighbor whose right column is nearest to the left column of that neighbor."""
    right, left = (cut[:, :, :, column].reshape(*cut.shape[:2], -1) for column in (-1, 0))
    distances = ((right[:, :, None] - left[:, None]) ** 2).mean(-1) + np.where(np.eye(GRID**2), np.inf, 0)
    asked = [i for i in range(GRID**2) if i % GRID < GRID - 1]
    return float((distances[:, asked].argmin(-1) == np.array(asked) + 1).mean())


def shifts(tile: np.ndarray) -> list[float]:
    """Red and blue against green of a tile [h, w, 3], in pixels down and right: a c = b + c0 G + dy dG/dy + dx dG/dx, least squares."""
    green = tile[..., 1]
    down, right = np.gradient(green)
    terms = np.stack([np.ones_like(green), green, down, right], -1).reshape(-1, 4)
    found = np.linalg.lstsq(terms, tile[..., [0, 2]].reshape(-1, 2), rcond=1e-6)[0]
    gain = np.where(np.abs(found[1]) > 1e-3, found[1], 1)
    return [*(found[2] / gain), *(found[3] / gain)]


def aberration(cut: np.ndarray, corners: np.ndarray) -> float:
    """Accuracy of a linear classifier of places, on the second half of the images."""
    features = np.array([shifts(tile) for tile in cut.reshape(-1, *cut.shape[2:])])
    places, half = np.tile(np.arange(GRID**2), len(cut)), len(cut) // 2 * GRID**2
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features[:half], places[:half])
    return float(classifier.score(features[half:], places[half:]))


def phases(images: np.ndarray) -> np.ndarray:
    """First column of a block of 8 x 8 pixels, modulo 8, of each of the images [N, h, w, 3] in [0, 1].

    That grid of blocks has the most coefficients of the cosine transform near 0, to which a JPEG rounds them.
    """
    luma = 255 * (images @ np.array([0.299, 0.587, 0.114]))
    rows, columns = ((side - 7) // 8 for side in luma.shape[1:])
    share = np.empty((8, 8, len(luma)))
    for down, right in np.ndindex(8, 8):
        blocks = luma[:, down : down + 8 * rows, right : right + 8 * columns].reshape(-1, rows, 8, columns, 8)
        share[down, right] = (np.abs(scipy.fft.dctn(blocks, axes=(2, 4), norm="ortho")) < 1).mean((1, 2, 3, 4))
    return share.max(0).argmax(0)


def jpeg(cut: np.ndarray, corners: np.ndarray) -> float:
    """Share of neighbors in a row whose distance modulo 8 is that of their phases."""
    starts = phases(cut.reshape(-1, *cut.shape[2:])).reshape(cut.shape[:2])
    first = [i for i in range(GRID**2) if i % GRID < GRID - 1]
    second = [i + 1 for i in first]
    true = (corners[:, second, 1] - corners[:, first, 1]) % 8
    return float(((starts[:, first] - starts[:, second]) % 8 == true).mean())


def color(cut: np.ndarray) -> np.ndarray:
    return cut.mean((2, 3))


def texture(cut: np.ndarray) -> np.ndarray:
    gray = cut.mean(-1)
    down, right = np.gradient(gray, axis=(2, 3))
    return np.log(np.stack([x.std((2, 3)) for x in (gray, down, right)], -1) + 1e-3)


def same_image(cut: np.ndarray, statistic) -> float:
    """Accuracy of a linear classifier of pairs of tiles by the differences of a statistic, on the second half of the images."""
    grid, x = math.isqrt(cut.shape[1]), statistic(cut)
    first, second, _ = neighbor_pairs(grid, grid)
    together, apart = (np.abs(x[:, first] - other[:, second]) for other in (x, np.roll(x, 1, axis=0)))
    pairs, half = np.concatenate([together, apart], 1), len(x) // 2
    answers = np.broadcast_to(np.arange(pairs.shape[1]) < len(first), pairs.shape[:2])
    (train, test), (known, asked) = ((y[:half].reshape(-1, *y.shape[2:]), y[half:].reshape(-1, *y.shape[2:])) for y in (pairs, answers))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, known)
    return float(classifier.score(test, asked))


STATISTICS = {"color": color, "texture": texture}
PROGRAMS = {"edge": edge, "aberration": aberration, "jpeg": jpeg}

# ------------------------------------------------------------------------------------------------- pictures


def noise_pictures(count: int, side: int, seed: int = 0) -> np.ndarray:
    """1/f noise, float [count, side, side, 3] in [0, 1], with channels that are alike to nine parts in ten."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    white = rng.standard_normal((count, side, side, 4))
    waves = np.fft.ifft2(np.fft.fft2(white, axes=(1, 2)) / frequency[..., None], axes=(1, 2)).real
    mixed = 0.9 * waves[..., :1] + 0.1 * waves[..., 1:]
    spread = mixed.std((1, 2), keepdims=True)
    return np.clip(0.5 + 0.2 * mixed / spread, 0, 1)


def magnified(pictures: np.ndarray, red: float, blue: float) -> np.ndarray:
    """Pictures whose red and blue are magnified about the center, as by a lens."""
    center, out = (np.array(pictures.shape[1:3]) - 1) / 2, pictures.copy()
    for channel, factor in ((0, red), (2, blue)):
        for picture, into in zip(pictures, out, strict=True):
            scipy.ndimage.affine_transform(
                picture[..., channel], np.eye(2) / factor, center - center / factor, output=into[..., channel], order=3, mode="nearest"
            )
    return out


def compressed(pictures: np.ndarray, quality: int) -> np.ndarray:
    """Pictures after a JPEG of this quality."""

    def through(picture):
        file = io.BytesIO()
        Image.fromarray(np.round(picture * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file)) / 255

    return np.stack([through(picture) for picture in pictures])


def resized(pictures: np.ndarray, least: float, most: float, seed: int = 0) -> np.ndarray:
    """Pictures resized by a random factor each, cut or continued to their size."""
    rng, side, out = np.random.default_rng(seed), pictures.shape[1], []
    for picture in pictures:
        new = round(side * rng.uniform(least, most))
        image = Image.fromarray(np.round(picture * 255).astype(np.uint8)).resize((new, new), Image.BICUBIC)
        pixels = np.asarray(image) / 255
        out.append(np.pad(pixels, [(0, max(0, side - new))] * 2 + [(0, 0)], "reflect")[:side, :side])
    return np.stack(out)


# ------------------------------------------------------------------------------------------------- tables


def made_up(images: int) -> list[tuple[str, str, float]]:
    """(probe, setting, accuracy)"""
    rows, key = [], jax.random.key(0)

    def measure(probe, setting, pictures, size, jitter, recipe=()):
        cut, corners = tiles(jnp.asarray(pictures, jnp.float32), key, GRID, size, jitter)
        cut = make_patch_views(recipe)(cut, key)
        rows.append((probe, setting, PROGRAMS[probe](np.asarray(cut), np.asarray(corners))))
        return cut, corners

    for gap, jitter in ((0, 0), (2, 0), (8, 0), (21, 0), (21, 21)):
        text = f"gap {gap}" if not jitter else f"mean gap {gap}, jitter {jitter}"
        cut, corners = measure("edge", text, noise_pictures(images, GRID * (64 + gap)), 64, jitter)
        rows.append(("edge", f"{text}, standardized", edge(np.asarray(standardize(cut)), np.asarray(corners))))
    plain = noise_pictures(images, 255)
    lens, other = magnified(plain, 1.004, 1.004), magnified(plain, 1.004, 0.996)
    measure("aberration", "no lens", plain, 64, 21)
    for name, recipe in (("as it is", ()), ("gray", (("grayscale", {"p": 1.0}),)), ("dropped colors", (("drop_colors", {}),)),
                         ("projected colors", (("project_colors", {}),))):  # fmt: skip
        measure("aberration", f"red and blue + 0.4 %, {name}", lens, 64, 21, recipe)
    measure("aberration", "red + 0.4 %, blue - 0.4 %, projected colors", other, 64, 21, (("project_colors", {}),))
    for quality in (30, 50, 75, 90):
        measure("jpeg", f"quality {quality}", compressed(plain, quality), 64, 21)
    measure("jpeg", "quality 75, resized by 0.8 to 1.2", resized(compressed(plain, 75), 0.8, 1.2), 64, 21)
    return rows


def of_config(config, images: int) -> list[tuple[str, str, float]]:
    """(probe, 'as the network sees them', accuracy) of the tiles of a config's train split. UserError without such tiles."""
    model, pairs = config.model, config.method == "cooccurrence"
    if model.get("grid") != GRID and not pairs:
        raise UserError(
            f"config.method={config.method!r} has no tiles in a {GRID} x {GRID} grid; choose relative_patch, jigsaw or cooccurrence"
        )
    source = open_data(config.data, config.data.train_split)
    config = fill_in(config, read_facts(config.data, source, {}))
    images = min(images, len(source))
    batch, _ = Reader(source, config.data.ops, ("image",)).batch(range(images), [(0, i) for i in range(images)])
    keys = jax.random.split(jax.random.key(0), 3)
    whole = jax.jit(one_view(config))(batch["image"], keys[0])
    cut, corners = tiles(whole, keys[1], model.grid, model.tile, model.jitter)
    cut = make_patch_views(model.tile_operations)(cut, keys[2])
    cut = standardize(cut) if model.get("standardize") else cut
    if pairs:
        return [(name, "as the network sees them", same_image(np.asarray(cut), statistic)) for name, statistic in STATISTICS.items()]
    fit = [probe for probe in PROGRAMS if probe != "jpeg" or model.tile >= SMALLEST_FOR_JPEG]
    return [(probe, "as the network sees them", PROGRAMS[probe](np.asarray(cut), np.asarray(corners))) for probe in fit]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="", help="configs/METHOD.py:VARIANT; default: made-up pictures")
    parser.add_argument("--images", type=int, default=512, help="pictures (default: 512)")
    args, overrides = parser.parse_known_args(arguments)
    try:
        rows = of_config(load_config(args.config, overrides), args.images) if args.config else made_up(args.images)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for probe, setting, accuracy in rows:
        print(f"{probe:12}{setting:48}{accuracy:6.3f}  chance {CHANCE[probe]:.3f}")
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    print("\nrows of docs/results/robustness.csv, without the machine and a note:")
    path, _, variant = (args.config or "benchmarks/shortcuts.py").partition(":")
    for probe, setting, accuracy in rows:
        print(f'shortcuts,{path},{variant},"{probe}: {setting}",,,accuracy,{accuracy:.3f},,,shortcuts,{commit.stdout.strip()},,')
    return 0


if __name__ == "__main__":
    sys.exit(main())
