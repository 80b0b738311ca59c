"""Raw pixels as a baseline for representations, by the same evaluations.

    python benchmarks/pixel_floor.py --config=configs/simclr.py:cifar10_small [--config.data.data_dir=...]

Weighted kNN on raw pixels (in [0, 1], and normalized by ImageNet's mean and std) for the usual (k, T), also after subtracting
the mean image, and a ridge classifier. Prints a line for each, with its protocol.
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
    experiment = build_experiment(configs.load(args.config, overrides))
    context = raw_pixel_context(experiment.config, experiment.run.mesh)
    nearest = functools.partial(knn.evaluate, context)
    for layer in ("pooled", "normalized"):
        for normalization in ("none", "center"):
            for k, temperature in SETTINGS:
                result = nearest(k=k, temperature=temperature, layer=layer, normalization=normalization)
                print(f"{result.metrics['top1']:6.2f}  {result.protocol}", flush=True)
    result = linear.evaluate(context, solver="ridge")
    print(f"{result.metrics['top1']:6.2f}  {result.protocol}")


if __name__ == "__main__":
    main()
