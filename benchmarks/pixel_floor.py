"""What pixels reach: the floor under every representation, by the evaluations that representations get.

    python benchmarks/pixel_floor.py --config=configs/simclr.py:cifar10_small [--data_dir=...]

Weighted kNN on raw pixels (in [0, 1], and without ImageNet's mean and std) for the usual (k, T), also after subtracting the mean
picture, and a ridge classifier. One line each, with its protocol.
"""

import argparse
import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ssl_jax.evals.kinds import knn, linear
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.contexts import raw_pixel_context

SETTINGS = ((20, 0.07), (200, 0.1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/simclr.py")
    args, overrides = parser.parse_known_args()
    this = build_experiment(configs.load(args.config, overrides))
    context = raw_pixel_context(this.config, this.run.mesh)
    nearest = functools.partial(knn.evaluate, context)
    for layer in ("pooled", "normalized"):
        for normalization in ("none", "center"):
            for k, temperature in SETTINGS:
                told = nearest(k=k, temperature=temperature, layer=layer, normalization=normalization)
                print(f"{told.metrics['top1']:6.2f}  {told.protocol}", flush=True)
    told = linear.evaluate(context, solver="ridge")
    print(f"{told.metrics['top1']:6.2f}  {told.protocol}")


if __name__ == "__main__":
    main()
