"""Write image grids of a generative run, and pictures of pretext tasks and transfers.

  python launch.py sample --workdir=runs/gan
  python launch.py sample --workdir=runs/gan --count=100 --seed=1 --truncation=0.5 --step=4000
  python launch.py sample --workdir=runs/prior --acceptance=0.5

Writes to WORKDIR/samples/ (or --output):
  grid.png            samples with averaged weights and standing statistics, one row per class of conditional models; with
                      --acceptance=0.5 the half of each class that a classifier on the features of --extractor prefers
  truncation.png      a row per truncation strength of the same latents (where latents can be truncated)
  interpolation.png   a row per pair of latents: the path between them (on the sphere for normal latents; not for tokens)
  mixing.png          StyleGAN: coarse styles of the row, fine styles of the column
  reconstruction.png  test images above their reconstructions (the only page of tokenizers and autoencoders)
  traversal.png       variational autoencoders: a row per latent, with values from -3 to 3 in the code of a test image
  completion.png      priors: test images, the part that is kept, and completions of it
  pretext.png         pretext tasks: questions about test images above the answers, green if right
  motion.png          egomotion: predicted against true motion between two views, a panel for each axis
  vqa.png             questions about test images, where the model looks, its answers and the true ones
  affinity.png        co-occurrence: test images, the affinity of a patch with all others, segments by it and by color, the mask
  segmentation.png    segmentation: test images, the true classes of their pixels, the predicted ones, and the errors in red
  neighbors.png       a row per sample: the sample, then its nearest training images in the features of --extractor
"""

from __future__ import annotations

from ssl_jax.cli.main import add_step, add_workdir, folder, number, whole
from ssl_jax.errors import UserError


def add_arguments(sub) -> None:
    add_workdir(sub)
    add_step(sub)
    sub.add_argument("--count", type=whole("--count", 1, 2**20), default=64, help="images in the grid (default 64)")
    sub.add_argument("--seed", type=whole("--seed", 0), default=0, help="of the latents (default 0)")
    sub.add_argument("--truncation", type=number("--truncation"), help="of all pages but truncation.png (default: none)")
    sub.add_argument(
        "--acceptance", type=number("--acceptance", 0, 1, positive=True), default=1.0,
        help="share of each class that grid.png keeps (default 1: all)",
    )  # fmt: skip
    sub.add_argument("--extractor", default="random_conv", help="features of neighbors.png and --acceptance (see config.evals)")
    sub.add_argument("--output", type=folder("--output"), help="folder (default: WORKDIR/samples)")


def main(args, overrides) -> int:
    if overrides:
        raise UserError(f"argument {overrides[0]!r} is not understood; sample shows a run as it was trained")
    from ssl_jax.experiment.sample_pages import save_pages  # imports JAX, which --help avoids

    choices = (args.count, args.seed, args.truncation, args.acceptance, args.extractor)
    for path in save_pages(args.workdir, args.output or args.workdir / "samples", args.step, *choices):
        print(path)
    return 0
