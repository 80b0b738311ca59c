"""Does the code of a BiGAN keep the image? Three perceptrons on the 8 x 8 digits of scikit-learn, three seeds.

  python benchmarks/bigan_digits.py

Networks, loss and rates of configs/bigan.py:mnist with 256 units and 16 uniform latents; 1,297 training digits, 500 test
digits, 8,000 steps of 128. The reconstruction ratio is the mean distance of a test digit to G(E(x)), divided by that of
shuffled digits. Prints losses and ratio of each seed. Exits with 1 unless, for every seed, the losses start at ln 2 and the
ratio falls below 0.75 by step 8,000.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ssl_jax.engine.method import State
from ssl_jax.engine.optim import make_optimizers
from ssl_jax.engine.step import make_step
from ssl_jax.experiment import config as configs
from ssl_jax.methods import bigan

ROOT = pathlib.Path(__file__).parent.parent
BATCH, STEPS, TRAIN, PRINTED = 128, 8000, 1297, (0, 2000, 4000, 8000)


def data(seed):
    """(train, test): uint8 [N, 8, 8, 3]."""
    images = np.round(load_digits().images[..., None].repeat(3, -1) * (255 / 16)).astype(np.uint8)
    images = images[np.random.default_rng(seed).permutation(len(images))]
    return jnp.asarray(images[:TRAIN]), images[TRAIN:]


def make():
    config = configs.load(f"{ROOT}/configs/bigan.py:mnist", ()).copy_and_resolve_references()
    with config.unlocked():
        config.views = ((("random_crop", dict(size=8)),),)
        config.data.image_shape, config.dtype, config.batch_size = (8, 8, 3), "float32", BATCH
        config.model.generator.shape, config.model.latent.size = (8, 8, 1), 16
        for network in ("generator", "encoder", "discriminator"):
            config.model[network].widths = (256, 256)
    return config, bigan.build(config, {})


def ratio(method, state, images):
    reconstructed = np.asarray(method.fns.reconstruct(state.params, state.mutable, images))
    real = images / np.float32(255)
    own, other = (np.linalg.norm((x - reconstructed).reshape(len(x), -1), axis=1).mean() for x in (real, np.roll(real, 1, 0)))
    return own / other


def train(config, method, seed):
    """{step: (discriminator loss, generator loss, ratio)}"""
    (images, test), key = data(seed), jax.random.key(seed)
    params, mutable = method.init(key, {"image": images[:BATCH]}, {})
    optimizers, _ = make_optimizers(config.optim, params, STEPS, BATCH, TRAIN)
    state = State(jnp.int32(0), params, {group: optimizers[group].init(params[group]) for group in params}, mutable, {})
    step = make_step(method, optimizers)

    def once(state, _):
        batch = images[jax.random.choice(jax.random.fold_in(key, state.step), TRAIN, (BATCH,), replace=False)]
        return step(state, {"image": batch}, key)

    many = jax.jit(lambda s: jax.lax.scan(once, s, length=PRINTED[1] // 2))
    found = {0: (np.nan, np.nan, ratio(method, state, test))}
    while (at := int(state.step)) < STEPS:
        state, metrics = many(state)
        losses = [np.asarray(metrics[f"game/{name}"]) for name in ("loss/discriminator", "loss/generator+encoder")]
        if at == 0:
            found[0] = (*(float(x[0]) for x in losses), found[0][2])
        if int(state.step) in PRINTED:
            found[int(state.step)] = (*(float(x[-100:].mean()) for x in losses), ratio(method, state, test))
    return found


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    config, method = make()
    good = True
    print(f"{'seed':>4}{'step':>8}{'D loss':>10}{'G, E loss':>11}{'ratio':>8}")
    for seed in range(3):
        found = train(config, method, seed)
        for step, (d, g, kept) in found.items():
            print(f"{seed:4}{step:8}{d:10.4f}{g:11.4f}{kept:8.3f}", flush=True)
        good &= abs(found[0][0] - np.log(2)) < 1e-4 and abs(found[0][1] - np.log(2)) < 1e-4 and found[8000][2] < 0.75
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
