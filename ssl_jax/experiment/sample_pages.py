"""The pages of `launch.py sample`: a grid, truncation, interpolation, mixing, reconstructions, nearest neighbors, pretext tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ssl_jax.engine.method import State, inference_state
from ssl_jax.engine.pictures import save_grid, save_picture
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Extractor
from ssl_jax.evals.kinds.knn import neighbors
from ssl_jax.evals.lib import rejection
from ssl_jax.evals.lib.features import extract
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.contexts import model_context, open_eval
from ssl_jax.experiment.distributed import start_jax
from ssl_jax.experiment.evaluate import restore
from ssl_jax.experiment.extractors import open_extractor
from ssl_jax.experiment.neighbors import fetch_images
from ssl_jax.experiment.record import Experiment
from ssl_jax.experiment.sampler import OpenSampler, open_labels, open_sampler
from ssl_jax.experiment.workdir import read_config

STRENGTHS = {"psi": (1.0, 0.7, 0.5, 0.3, 0.0), "normal": (None, 2.0, 1.0, 0.5, 0.2)}  # truncation of each row
ROWS, COLUMNS = 6, 10
OF_IMAGES = ("reconstruction", "traversal")  # pages that need no sampler
# Pages that an evaluation of the run draws, and the function that its picture needs.
EVALUATED = {
    "pretext": "draw_pretext", "motion": "motion", "affinity": "affinity", "inpainting": "inpaint", "segmentation": "segment",
    "detection": "detect", "vqa": "answer",
}  # fmt: skip


def save_pages(
    workdir: Path,
    folder: Path,
    step: int | None,
    count: int,
    seed: int,
    truncation: float | None,
    acceptance: float,
    extractor: str,
) -> Iterator[Path]:
    """Write the pages that `launch.py sample --help` lists into `folder`, and yield the path of each.

    Args:
        step: of the checkpoint; None: the newest.
        count: images in the grid, at least 1.
        truncation: of all pages but 'truncation'; None: no truncation.
        acceptance: share of each class that the grid keeps, in (0, 1].
        extractor: its features find the nearest neighbors and decide which samples are kept.

    Raises:
        UserError: there is no such run, checkpoint or extractor, or `acceptance` is out of range.
    """
    start_jax()
    rejection.check_rate(acceptance, "--acceptance")
    experiment = build_experiment(read_config(workdir), workdir=workdir)
    rejection.check_labels(acceptance, "--acceptance", open_labels(experiment))
    network = open_extractor(extractor, "legacy", mesh=experiment.run.mesh)
    state = restore(workdir, experiment, step)
    own = [evaluation.to_dict() for evaluation in experiment.config.evals.values() if evaluation.kind in EVALUATED]
    drawn = [entry for entry in own if getattr(experiment.fns, EVALUATED[entry["kind"]])]
    no_sampler = experiment.sampler is None and (experiment.fns.reconstruct or drawn)
    sampler = None if no_sampler else open_sampler(experiment, state)

    def prefer(labels):
        batches, *_ = rejection.select_samples(model_context(experiment, state), network, labels, seed, truncation, acceptance)
        return np.concatenate(list(batches)) / np.float32(255)

    pages = {
        "grid": lambda: grid(sampler, experiment.config.data.num_classes, count, seed, truncation,
                             None if acceptance == 1 else prefer),
        "truncation": lambda: truncations(sampler, experiment.config, seed),
        "interpolation": lambda: interpolations(sampler, experiment.config, seed, truncation),
        "mixing": lambda: mixing(sampler, seed, truncation),
        "reconstruction": lambda: reconstructions(experiment, state),
        "traversal": lambda: traversals(experiment, state),
        "completion": lambda: completions(experiment, sampler, seed),
        "neighbors": lambda: nearest(experiment, sampler, network, seed, truncation),
    }
    for name, page in pages.items():
        if sampler is None and name not in OF_IMAGES:
            continue
        pictures = page()
        if pictures is not None:
            save_grid(pictures, folder / f"{name}.png")
            yield folder / f"{name}.png"
    for entry in drawn:
        name = entry["kind"]
        save_picture(evals.run({name: entry}, model_context(experiment, state))[name].picture, folder / f"{name}.png")
        yield folder / f"{name}.png"


def grid(
    sampler: OpenSampler, classes: int | None, count: int, seed: int, truncation: float | None, prefer: Callable | None = None
) -> np.ndarray:
    """Samples, [count, h, w, 3]; of a conditional generator a row per class, [classes, columns, h, w, 3], at least `count` images.

    Where there are more classes than `count`, [count, h, w, 3] with one image each of evenly spaced classes.

    Args:
        classes: of the data; None without labels.
        prefer: (labels, int [N]) -> images, in place of the sampler's; for rejection sampling.
    """
    latents = dict(sampler.latents(count, seed))
    if "label" not in latents:
        return sampler.sample(latents, truncation)
    columns = -(-count // classes)
    if count >= classes:
        count = columns * classes
        latents = dict(sampler.latents(count, seed))
    latents["label"] = jnp.arange(count, dtype=jnp.int32) * classes // count
    pictures = sampler.sample(latents, truncation) if prefer is None else prefer(np.asarray(latents["label"]))
    return pictures.reshape(classes, columns, *pictures.shape[1:]) if count >= classes else pictures


def truncations(sampler: OpenSampler, config, seed: int) -> np.ndarray | None:
    """The same latents at every truncation of STRENGTHS, [strengths, COLUMNS, h, w, 3]; None where latents cannot be truncated."""
    kind = "psi" if sampler.unbound.mix else kind_of_latents(config)
    if kind not in STRENGTHS:
        return None
    latents = sampler.latents(COLUMNS, seed)
    return np.stack([sampler.sample(latents, strength) for strength in STRENGTHS[kind]])


def interpolations(sampler: OpenSampler, config, seed: int, truncation: float | None) -> np.ndarray | None:
    """Paths from one latent to another, with the class of the first, [ROWS, COLUMNS, h, w, 3]; None without latents z."""
    ends = sampler.latents(2 * ROWS, seed)
    if "z" not in ends:
        return None
    between = spherical if kind_of_latents(config) == "normal" else linear
    z = between(ends["z"][:ROWS, None], ends["z"][ROWS:, None], jnp.linspace(0, 1, COLUMNS)[None, :, None])
    others = {name: jnp.repeat(x[:ROWS], COLUMNS, axis=0) for name, x in ends.items() if name != "z"}
    pictures = sampler.sample({"z": z.reshape(-1, z.shape[-1]), **others}, truncation)
    return pictures.reshape(ROWS, COLUMNS, *pictures.shape[1:])


def kind_of_latents(config) -> str:
    """'normal', 'uniform', or 'tokens' for a prior over codes. Configs without `model.latent` (StyleGAN, VAE) have normal ones."""
    return "tokens" if "tokenizer" in config.get("stages", {}) else config.model.get("latent", {}).get("kind", "normal")


def linear(a, b, t):
    """From a (t=0) to b (t=1)."""
    return a + t * (b - a)


def spherical(a, b, t):
    """From a (t=0) to b (t=1) along a great circle. The mean of two normal vectors would be shorter than either."""
    lengths = jnp.linalg.norm(a, axis=-1, keepdims=True) * jnp.linalg.norm(b, axis=-1, keepdims=True)
    cosine = jnp.sum(a * b, -1, keepdims=True) / lengths
    angle = jnp.arccos(jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6))
    return (jnp.sin((1 - t) * angle) * a + jnp.sin(t * angle) * b) / jnp.sin(angle)


def mixing(sampler: OpenSampler, seed: int, truncation: float | None) -> np.ndarray | None:
    """Style mixing, [1 + ROWS, 1 + ROWS, h, w, 3], as in figure 3 of Karras et al. 2019; the first row and column are unmixed."""
    if sampler.unbound.mix is None:
        return None
    latents = sampler.latents(2 * ROWS, seed)
    first, second = ({name: x[part] for name, x in latents.items()} for part in (slice(ROWS), slice(ROWS, None)))
    repeated = {name: jnp.repeat(x, ROWS, axis=0) for name, x in first.items()}, {name: jnp.tile(x, (ROWS,) + (1,) * (x.ndim - 1))
                for name, x in second.items()}  # fmt: skip
    mixed = np.asarray(sampler.unbound.mix(sampler.prepared(), *repeated, 2, truncation))
    table = np.ones((1 + ROWS, 1 + ROWS, *mixed.shape[1:]), np.float32)
    table[1:, 0], table[0, 1:] = sampler.sample(first, truncation), sampler.sample(second, truncation)
    table[1:, 1:] = mixed.reshape(ROWS, ROWS, *mixed.shape[1:])
    return table


def reconstructions(experiment: Experiment, state: State) -> np.ndarray | None:
    """Rows of test images, each above its reconstructions, [6, COLUMNS, h, w, 3]; None without an encoder."""
    if experiment.fns.reconstruct is None:
        return None
    images = next(iter(open_eval(experiment.config, "test")))["image"]
    columns = min(COLUMNS, len(images) // 3)
    if not columns:
        raise UserError(f"config.eval_batch_size={len(images)} is too small for three rows of reconstructions")
    images = images[: 3 * columns]
    reconstructed = np.asarray(experiment.fns.reconstruct(state.params, inference_state(state), images))
    rows = (images / 255, reconstructed)
    pairs = np.stack([row.reshape(3, columns, *row.shape[1:]) for row in rows], 1)
    return pairs.reshape(6, columns, *images.shape[1:])


def traversals(experiment: Experiment, state: State) -> np.ndarray | None:
    """Each latent of the first test image from -3 to 3, [latents, COLUMNS, h, w, 3]; None for a method without `traverse`."""
    if experiment.fns.traverse is None:
        return None
    image = next(iter(open_eval(experiment.config, "test")))["image"][:1]
    values = np.linspace(-3, 3, COLUMNS, dtype=np.float32)
    return np.asarray(experiment.fns.traverse(state.params, inference_state(state), image, values))[0]


def completions(experiment: Experiment, sampler: OpenSampler, seed: int) -> np.ndarray | None:
    """Test images, their upper halves, and completions of those, [COLUMNS, ROWS, h, w, 3]; None for a method without `complete`."""
    if sampler.unbound.complete is None:
        return None
    batch = next(iter(open_eval(experiment.config, "test")))
    images = batch["image"][:COLUMNS]
    whole = images / np.float32(255)
    rows = [whole, np.where(np.arange(whole.shape[1])[:, None, None] < whole.shape[1] // 2, whole, 0.5)]
    for i in range(ROWS - len(rows)):
        latents = dict(sampler.latents(len(images), seed + i))
        if "label" in latents:
            latents["label"] = jnp.asarray(batch["label"][:COLUMNS])
        rows.append(np.asarray(sampler.unbound.complete(sampler.prepared(), latents, images)))
    return np.stack(rows, 1)


def nearest(experiment: Experiment, sampler: OpenSampler, extractor: Extractor, seed: int, truncation: float | None) -> np.ndarray:
    """Samples, each with its nearest training images by cosine of features, [ROWS, COLUMNS, h, w, 3]: shows memorization."""
    samples = np.round(sampler.pictures(ROWS, seed, truncation) * 255).astype(np.uint8)
    batches = open_eval(experiment.config, "train", experiment.run.mesh)
    bank = extract(extractor.encode, batches, "pooled", experiment.run.mesh).x
    features = np.asarray(extractor.encode(samples)["pooled"])
    index, _ = neighbors(bank, features, min(COLUMNS - 1, len(bank)), mesh=experiment.run.mesh)
    images = fetch_images(open_eval(experiment.config, "train"), index.ravel(), len(bank))
    return np.stack([np.stack([sample, *(images[i] for i in row)]) for sample, row in zip(samples, index.tolist(), strict=True)])
