"""The families of sweeps/families.py with JPEG CIFAR-10.

  python launch.py sweep --sweep=sweeps/families_cifar10.py --workdir=sweeps_out/families_cifar10 --jobs=2
"""

from ssl_jax.experiment.sweep import Sweep
from sweeps.families import of_block


def get_sweep() -> Sweep:
    return of_block("cifar10_")
