"""How does SimCLR's error fall with the width of the encoder and the number of images?

  python launch.py sweep --sweep=sweeps/scaling.py --workdir=sweeps_out/scaling --jobs=2
  python launch.py compare sweeps_out/scaling --metric=linear/top1 --metric=knn/top1 --power_law=model.encoder.width,images

A power law, error = c width^-a images^-b, is fitted over all 27 runs, with intervals of a and b. Each length is a run of its own,
since the learning rate falls to zero at its end.
"""

from ssl_jax.experiment.sweep import Sweep, product


def get_sweep() -> Sweep:
    widths = {"model.encoder.width": (0.125, 0.25, 0.5)}
    lengths = {"total": ("5 epochs", "15 epochs", "45 epochs"), "evaluate_every": ("5 epochs", "15 epochs", "45 epochs")}
    return Sweep(product("configs/simclr.py", widths, lengths), seeds=(0, 1, 2))
