"""What keeps methods without negatives from collapsing? Each paper's ablation, on the embedded scenes.

  python launch.py sweep --sweep=sweeps/collapse.py --workdir=sweeps_out/collapse --jobs=2
  python launch.py compare sweeps_out/collapse

BYOL has a predictor, SimSiam a stop-gradient, VICReg a variance term, DINO centering and sharpening, and MoCo normalizes groups of
images by themselves. `embedding/l2_std` is about 1 where embeddings are spread, and 0 where all images have the same one.
"""

from ssl_jax.experiment.sweep import Sweep, Variation

ABLATIONS = {
    "byol": {"": "BYOL", "scenes_no_predictor": "BYOL without predictor"},
    "simsiam": {"": "SimSiam", "scenes_no_stop_gradient": "SimSiam without stop-gradient"},
    "vicreg": {"": "VICReg", "scenes_no_variance": "VICReg without variance"},
    "dino": {"": "DINO", "scenes_no_centering": "DINO without centering", "scenes_no_sharpening": "DINO without sharpening"},
    "moco": {"": "MoCo", "scenes_one_batch_norm": "MoCo with one BatchNorm"},
}


def get_sweep() -> Sweep:
    variations = [
        Variation(name, f"configs/{method}.py" + (f":{variant}" if variant else ""))
        for method, variants in ABLATIONS.items()
        for variant, name in variants.items()
    ]
    embedding = {"evals.embedding.kind": "representation", "evals.embedding.layer": "projection"}
    return Sweep(variations, seeds=(0, 1, 2), common={"total": "20 epochs", "evaluate_every": "20 epochs", **embedding})
