"""How many of eight modes does a generator keep? A ring of eight Gaussians, four adversarial losses, three seeds.

  python benchmarks/ring.py

The target has radius 2 and deviation 0.02. `engine.step` trains a generator 16-128-128-2 and a discriminator 2-128-128-128-1,
one step each of 256 points in turn. A mode is kept if at least 1 % of 2,500 samples lie within 0.2 of it. Prints a line for
each loss. Exits with 1 unless, for every seed, the plain non-saturating loss keeps at most three modes, and R1 and spectral
normalization keep at least seven.
"""

import argparse
import pathlib
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ssl_jax.engine.method import Method, Phase, State
from ssl_jax.engine.optim import make_optimizers
from ssl_jax.engine.step import make_step
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.spectral import SpectralDense
from ssl_jax.objectives.adversarial import GAN_LOSSES, r1

BATCH, STEPS, SAMPLES, LATENT = 256, 5000, 2500, 16
ANGLES = 2 * np.pi * np.arange(8) / 8
MODES = 2 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1).astype(np.float32)
CASES = {  # name: (adversarial loss, spectral normalization, weight of R1, beta1, beta2, (least, most) modes kept by every seed)
    "minimax": ("minimax", False, 0.0, 0.5, 0.99, None),
    "non-saturating": ("non_saturating", False, 0.0, 0.5, 0.99, (0, 3)),
    "non-saturating + R1": ("non_saturating", False, 1.0, 0.0, 0.99, (7, 8)),
    "hinge + spectral norm": ("hinge", True, 0.0, 0.0, 0.99, (7, 8)),
}


class Generator(nn.Module):
    @nn.compact
    def __call__(self, z, train):
        for _ in range(2):
            z = nn.relu(nn.Dense(128)(z))
        return nn.Dense(2)(z)


class Discriminator(nn.Module):
    spectral: bool

    @nn.compact
    def __call__(self, x, train):
        def dense(width, x):
            return SpectralDense(width)(x, train) if self.spectral else nn.Dense(width)(x)

        for _ in range(3):
            x = nn.leaky_relu(dense(128, x), 0.2)
        return dense(1, x)[:, 0]


def ring(key, count):
    mode_key, noise_key = jax.random.split(key)
    return jnp.asarray(MODES)[jax.random.randint(mode_key, (count,), 0, 8)] + 0.02 * jax.random.normal(noise_key, (count, 2))


def build(loss, spectral, penalty) -> Method:
    generator, discriminator, losses = Generator(), Discriminator(spectral), GAN_LOSSES[loss]

    def init(key, batch, frozen):
        first, second = jax.random.split(key)
        g, _ = create(generator, first, jnp.zeros((1, LATENT)))
        d, state = create(discriminator, second, jnp.zeros((1, 2)))
        return {"generator": g, "discriminator": d}, {"discriminator": state}

    def fake(params, key):
        return run(generator, params, {}, jax.random.normal(key, (BATCH, LATENT)), train=True)[0]

    def d_loss(train, state, batch, key):
        real, params = ring(jax.random.fold_in(key, 0), BATCH), train["discriminator"]
        spectral_state = state.mutable["discriminator"]
        on_real, spectral_state = run(discriminator, params, spectral_state, real, train=True)
        samples = fake(state.params["generator"], jax.random.fold_in(key, 1))
        on_fake, spectral_state = run(discriminator, params, spectral_state, samples, train=True)
        value = losses.discriminator(on_real, on_fake)
        if penalty:
            value += penalty * r1(lambda x: run(discriminator, params, spectral_state, x, train=False)[0], real)
        return value, ({"discriminator": spectral_state}, {})

    def g_loss(train, state, batch, key):
        x = fake(train["generator"], key)
        on_fake, spectral_state = run(discriminator, state.params["discriminator"], state.mutable["discriminator"], x, train=True)
        return losses.generator(on_fake), ({"discriminator": spectral_state}, {})

    phases = (Phase("d", ("discriminator",), d_loss), Phase("g", ("generator",), g_loss))
    return Method({}, init, phases, encode=lambda params, mutable, x: {})


def train(loss, spectral, penalty, b1, b2, seed):
    """(modes kept, mean losses of the last 100 steps)"""
    method = build(loss, spectral, penalty)
    key = jax.random.key(seed)
    params, mutable = method.init(key, {}, {})
    spec = dict(name="adam", lr=1e-3, b1=b1, b2=b2, schedule="constant")
    optimizers, _ = make_optimizers(dict(generator=spec, discriminator=spec), params, STEPS, BATCH, BATCH)
    opt = {group: optimizers[group].init(params[group]) for group in params}
    step = make_step(method, optimizers)
    state = State(jnp.int32(0), params, opt, mutable, {})
    state, metrics = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, {}, key), s, length=STEPS))(state)
    z = jax.random.normal(jax.random.fold_in(key, 12345), (SAMPLES, LATENT))
    x = np.asarray(run(Generator(), state.params["generator"], {}, z, train=False)[0])
    near = np.linalg.norm(x[:, None] - MODES, axis=-1) < 0.2
    return int((near.mean(0) >= 0.01).sum()), *(float(metrics[name][-100:].mean()) for name in ("d/loss", "g/loss"))


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    good = True
    print(f"{'loss':24}{'modes of 8, seeds 0-2':>24}{'D loss':>10}{'G loss':>10}{'seconds':>10}")
    for name, (*settings, expected) in CASES.items():
        began = time.perf_counter()
        runs = [train(*settings, seed) for seed in range(3)]
        modes, d, g = zip(*runs, strict=True)
        fine = expected is None or all(expected[0] <= m <= expected[1] for m in modes)
        good &= fine
        note = "" if fine else f"   expected {expected[0]} to {expected[1]}"
        print(f"{name:24}{modes!s:>24}{np.mean(d):10.3f}{np.mean(g):10.3f}{time.perf_counter() - began:10.0f}{note}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
