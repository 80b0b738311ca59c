"""How much does the temperature of SimCLR's loss matter on the embedded scenes?

  python launch.py sweep --sweep=sweeps/simclr_temperature.py --workdir=sweeps_out/simclr_temperature

Chen et al. 2020 (arXiv:2002.05709, table 5) find 0.1 best on ImageNet and 0.5 better than 1 with normalized features. The recipe here
has 0.2, the baseline. Twelve runs of a quarter of the recipe's length: the order may be another one for longer runs.
"""

from ssl_jax.experiment.sweep import Sweep, product


def get_sweep() -> Sweep:
    variations = product("configs/simclr.py", {"model.temperature": (0.05, 0.1, 0.2, 0.5)})
    return Sweep(variations, seeds=(0, 1, 2), baseline="simclr model.temperature=0.2", common={"total": "12 epochs"})
