"""Make the pictures of the documentation from finished runs, and its charts from docs/results/*.csv.

  python docs/pictures.py            charts only
  python docs/pictures.py RUNS

RUNS holds a workdir for each run, trained with the command in the caption of its picture (docs/methods/) and sampled with
`launch.py sample`. Pictures of runs that are not there are left as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from render import read, select

OUTPUT = Path(__file__).resolve().parent / "pictures"
GAP = 2  # pixels between the cells of a grid, before it is enlarged

# {picture: (run, metric of metrics.jsonl, label)}
CURVES = {
    "simclr_curve": ("simclr", "ssl/loss", "NT-Xent loss"),
    "gan_curve": ("gan", "d/loss", "discriminator loss"),
    "vqvae_curve": ("vqvae_l2", "vqvae/squared_error", "squared error"),
    "autoencoder_curve": ("autoencoder_deep", "ae/reconstruction", "reconstruction loss"),
    "rbm_stack_curve": ("rbm_stack", "tuning/loss", "loss after unrolling"),
    "vae_curve": ("vae", "vae/loss", "loss, nats"),
    "vit_vqgan_curve": ("vit_vqgan", "tokenizer/squared", "squared error"),
    "biggan_curve": ("biggan", "d/loss", "discriminator loss"),
    "ssgan_curve": ("ssgan", "d/rotation_accuracy", "accuracy on rotations"),
    "bigbigan_curve": ("bigbigan", "d/loss", "discriminator loss"),
    "stylegan_curve": ("stylegan", "d/loss", "discriminator loss"),
}
# {picture: (file of a run, rows, columns, pixels of a cell)}: the upper left part of a grid
GRIDS = {
    "simclr_views": ("simclr/pictures/views.png", 2, 8, 32),
    "gan_samples": ("gan/samples/grid.png", 6, 8, 32),
    "biggan_samples": ("biggan/samples/grid.png", 6, 6, 32),
    "ssgan_samples": ("ssgan/samples/grid.png", 5, 8, 32),
    "bigbigan_samples": ("bigbigan/samples/grid.png", 4, 8, 32),
    "bigbigan_reconstruction": ("bigbigan/samples/reconstruction.png", 4, 8, 32),
    "stylegan_samples": ("stylegan/samples/grid.png", 5, 8, 32),
    "bigan_samples": ("bigan/samples/grid.png", 4, 8, 32),
    "maskgit_samples": ("maskgit/samples/grid.png", 10, 7, 28),
    "vq_prior_samples": ("vq_prior/samples/grid.png", 10, 7, 28),
    "vqvae_reconstruction": ("vqvae_l2/samples/reconstruction.png", 4, 10, 28),
    "autoencoder_reconstruction": ("autoencoder_deep/samples/reconstruction.png", 4, 10, 28),
    "vae_samples": ("vae/samples/grid.png", 4, 8, 28),
    "vae_traversal": ("vae/samples/traversal.png", 6, 10, 28),
    "rbm_stack_reconstruction": ("rbm_stack/samples/reconstruction.png", 4, 10, 28),
    "context_encoder_reconstruction": ("p_context_encoder_0/samples/reconstruction.png", 4, 10, 32),
    "split_brain_reconstruction": ("p_split_brain_0/samples/reconstruction.png", 4, 6, 48),
    "colorization_reconstruction": ("p_colorization_0/samples/reconstruction.png", 4, 6, 48),
    "vit_vqgan_reconstruction": ("vit_vqgan/samples/reconstruction.png", 4, 10, 32),
}
COPIES = {"vqvae_codebook": "vqvae_l2/pictures/codebook_00000400.png", "simclr_neighbors": "simclr/pictures/neighbors.png",
          "rotation_answers": "rotation/pictures/pretext_00002250.png",
          "jigsaw_answers": "p_jigsaw_0/pictures/pretext_00002250.png",
          "relative_patch_answers": "p_relative_patch_0/pictures/pretext_00002250.png",
          "egomotion_motion": "p_egomotion_0/pictures/motion_00002250.png",
          "equivariance_answers": "p_equivariance_0/pictures/pretext_00002250.png",
          "cpc_answers": "p_cpc_0/pictures/pretext_00001800.png",
          "cooccurrence_affinity": "p_cooccurrence_0/pictures/affinity_00002250.png"}  # fmt: skip
# Of the README: (picture of GRIDS, title, rows and columns that are shown, every how many columns one)
BANNER = (
    ("simclr_views", "SimCLR: two views of each picture", 4, 4, 1),
    ("vae_traversal", "VAE: each row moves one latent", 4, 5, 2),
    ("vqvae_reconstruction", "VQ-VAE: digits, and back from 49 tokens", 4, 5, 1),
)


SCENES = {"SNDCGAN": ("gan", ""), "DCGAN": ("gan", "scenes_dcgan"), "BigGAN": ("biggan", ""), "StyleGAN2": ("stylegan", ""),
          "BigBiGAN": ("bigbigan", "")}  # fmt: skip


def cells(path: Path, size: int) -> np.ndarray:
    """A picture written by `save_grid` -> its cells, uint8 [rows, columns, size, size, 3], enlarged ones made small again."""
    picture = Image.open(path).convert("RGB")
    scale = next(s for s in (4, 3, 2, 1) if all((side / s - GAP) % (size + GAP) == 0 for side in picture.size))
    pixels = np.asarray(picture)[::scale, ::scale]
    rows, columns = ((side - GAP) // (size + GAP) for side in pixels.shape[:2])
    return np.array([
        [pixels[GAP + r * (size + GAP) :, GAP + c * (size + GAP) :][:size, :size] for c in range(columns)] for r in range(rows)
    ])  # fmt: skip


def grid(images: np.ndarray, scale: int = 2) -> np.ndarray:
    """[rows, columns, h, w, 3] -> one picture with white gaps, enlarged."""
    images = np.pad(images, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows, columns, h, w, _ = images.shape
    return images.transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, 3).repeat(scale, 0).repeat(scale, 1)


def curve(workdir: Path, metric: str, label: str, path: Path) -> None:
    """Draw one metric over steps. Raises KeyError where no line has it."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    points = [(line["step"], line[metric]) for line in lines if metric in line]
    if not points:
        raise KeyError(f"{workdir}: no line of metrics.jsonl has {metric!r}")
    figure, axes = plt.subplots(figsize=(5, 2.6), dpi=100, layout="constrained")
    axes.plot(*zip(*points, strict=True), linewidth=1)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    figure.savefig(path)
    plt.close(figure)


def over_steps(metric: str, label: str, path: Path, scale: str = "linear") -> None:
    """One metric of the adversarial methods on the embedded scenes, over steps."""
    lines = {}
    for name, (method, variant) in SCENES.items():
        rows = select(read("generation"), {"protocol": "scenes-generation", "method": method, "variant": variant, "metric": metric})
        lines[name] = [(int(row["step"]), float(row["value"])) for row in rows]
    chart(lines, "step", label, path, scale)


def over_depth(where: dict, path: Path) -> None:
    """Linear probe of each block, a line per seed, and their mean."""
    lines = {}
    for row in select(read("tokens"), where):
        block = row["metric"].removeprefix("depth/").removeprefix("block")
        if row["metric"].startswith("depth/") and block.isdigit() and row["seed"].isdigit():
            lines.setdefault(f"seed {row['seed']}", []).append((int(block), float(row["value"])))
    blocks = next(iter(lines.values()))
    lines["mean"] = [(x, float(np.mean([line[i][1] for line in lines.values()]))) for i, (x, _) in enumerate(blocks)]
    chart(lines, "block", "linear probe, %", path)


def chart(lines: dict[str, list[tuple[float, float]]], x: str, y: str, path: Path, scale: str = "linear") -> None:
    figure, axes = plt.subplots(figsize=(6, 3), dpi=100, layout="constrained")
    for name, points in lines.items():
        style = {"color": "black", "linewidth": 2.5} if name == "mean" else {}
        axes.plot(*zip(*points, strict=True), marker=".", label=name, **style)
    axes.set(xlabel=x, ylabel=y, yscale=scale)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path)
    plt.close(figure)


def banner(runs: Path, path: Path) -> None:
    """One picture of several runs, side by side."""
    ratios = [columns for *_, columns, _ in BANNER]
    figure, axes = plt.subplots(1, len(BANNER), figsize=(9, 2.8), dpi=100, layout="constrained", width_ratios=ratios)
    for ax, (name, title, rows, columns, stride) in zip(axes, BANNER, strict=True):
        file, _, _, size = GRIDS[name]
        images = cells(runs / file, size)
        if images.shape[0] < rows:  # a column per picture: its views go side by side
            images = images.swapaxes(0, 1)
            images = images[: rows * columns // images.shape[1]].reshape(rows, columns, *images.shape[2:])
        ax.imshow(grid(images[:rows, ::stride][:, :columns], 3))
        ax.set_title(title, fontsize=10)
        ax.axis("off")
    figure.savefig(path)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def charts() -> None:
    over_steps("generation/frechet", "Frechet distance", OUTPUT / "scenes_frechet.png", "log")
    over_steps("linear/top1", "linear probe, %", OUTPUT / "scenes_linear.png")
    over_depth({"variant": "mnist_t10k_probe", "subject": "trained"}, OUTPUT / "vq_prior_depth.png")
    over_depth({"method": "maskgit", "subject": "trained"}, OUTPUT / "maskgit_depth.png")


def main(runs: Path | None) -> None:
    OUTPUT.mkdir(exist_ok=True)
    charts()
    if runs is None:
        return
    for name, (run, metric, label) in CURVES.items():
        if (runs / run / "report.html").exists():  # the run has ended
            curve(runs / run, metric, label, OUTPUT / f"{name}.png")
    for name, (file, rows, columns, size) in GRIDS.items():
        if (runs / file).exists():
            Image.fromarray(grid(cells(runs / file, size)[:rows, :columns])).save(OUTPUT / f"{name}.png", optimize=True)
    for name, file in COPIES.items():
        if (runs / file).exists():
            Image.open(runs / file).convert("RGB").quantize(128).save(OUTPUT / f"{name}.png", optimize=True)
    if all((runs / GRIDS[name][0]).exists() for name, *_ in BANNER):
        banner(runs, OUTPUT / "banner.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
