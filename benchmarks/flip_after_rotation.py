"""Why images are mirrored before they are rotated, never after: the confusion of a rotation network, both ways.

    JAX_PLATFORMS=cpu python benchmarks/flip_after_rotation.py [--config.total=20 epochs]

Trains configs/rotation.py twice with one seed. The second time each rotated view is mirrored by a fair coin. A mirrored image that was
turned by 90 degrees is one that was turned by 270, so these answers become a guess, and no network exceeds 75 %. Prints the shares
of answers for each rotation of the held-out images, and rows for docs/results/robustness.csv.
"""

import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ssl_jax.augment.rotation import rotations
from ssl_jax.engine import loop
from ssl_jax.experiment.baselines import initial_state
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.contexts import model_context
from ssl_jax.experiment.training import load_config
from ssl_jax.methods import rotation

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMIT = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()

def mirrored_afterwards(images, turns):
    """As `rotations`; then each view is mirrored by a fair coin, which depends on its pixels, since there is no key."""
    views, labels = rotations(images, turns)
    heads = jnp.sum(jnp.round(views * 255), (2, 3, 4)).astype(jnp.int32) + jnp.arange(len(turns)) // 2
    return jnp.where((heads % 2 == 0)[..., None, None, None], views[:, :, :, ::-1], views), labels


def confusion(config) -> np.ndarray:
    """float64 [rotation, answer]: percent of the held-out views, after a training by `config`."""
    experiment = build_experiment(config)
    run, state = experiment.run, initial_state(experiment)
    batches = ({k: v for k, v in experiment.batches[i].items() if k != "_skipped"} for i in range(experiment.durations["total"]))
    for batch in loop.to_device(batches, run.mesh):
        state, _ = run.step(state, batch, run.root)
    context = model_context(experiment, state)

    def rows(batch, key):
        asked = context.model.fns.pretext(batch, key)[""]
        return {"rows": jnp.argmax(asked["logits"], -1)}

    given = context.encode_batches(rows, "rows", None, 0).x.astype(int)  # [N, rotations]
    return np.stack([100 * np.bincount(row, minlength=given.shape[1]) / len(given) for row in given.T])


def main():
    config = load_config(f"{ROOT}/configs/rotation.py", sys.argv[1:])
    lines = []
    for name, function in (("mirrored before", rotations), ("mirrored after", mirrored_afterwards)):
        rotation.rotations = function
        found = confusion(config.copy_and_resolve_references())
        print(f"{name}: {np.trace(found) / len(found):.2f} % right; answers in percent, one line for each rotation")
        print(np.array2string(found, precision=1, suppress_small=True), flush=True)
        shares = {"accuracy": np.trace(found) / len(found)}
        shares |= {f"{90 * i} taken for {90 * j}": found[i, j] for i, j in np.ndindex(found.shape)}
        lines += [
            f"rotation,benchmarks/flip_after_rotation.py,,{name},{config.seed},{config.total},{key},{value:.2f},,,rotation-flips,{COMMIT},,"
            for key, value in shares.items()
        ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
