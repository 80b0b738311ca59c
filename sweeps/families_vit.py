"""The families of sweeps/families.py with a small ViT on the embedded scenes.

  python launch.py sweep --sweep=sweeps/families_vit.py --workdir=sweeps_out/families_vit --jobs=2
"""

from ssl_jax.experiment.sweep import Sweep
from sweeps.families import of_block


def get_sweep() -> Sweep:
    return of_block("vit_")
