"""How much of an image should a masked autoencoder hide (He et al. 2022, figure 5)?

  python launch.py sweep --sweep=sweeps/mask_ratio.py --workdir=sweeps_out/mask_ratio --jobs=2
  python launch.py compare sweeps_out/mask_ratio
"""

from ssl_jax.experiment.sweep import Sweep, product


def get_sweep() -> Sweep:
    variations = product("configs/mae.py", {"model.mask_ratio": (0.25, 0.5, 0.75)})
    return Sweep(variations, seeds=(0, 1, 2), baseline=variations[-1].name)
