"""Steps of two adversarial methods against the same networks, losses and optimizers in eager PyTorch, on the CPU; and the gain of
lazy regularization.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/adversarial_step.py [--pairs 7] [--cases biggan_32 stylegan2_64]

biggan_32: class-conditional, hinge, spectral normalization in both networks, one step of each on a batch of 32. stylegan2_64:
16 steps on a batch of 16, with 16 steps of each network, one R1 step and four path-length steps. Without augmentations and
style mixing. A pair is a run of ours and one of the reference, in turns. Figures are medians over pairs, and the range of the
ratio of wall-clock times, above 1 if ours is faster. Quote figures of a quiet machine only.

The last lines compare 16 steps of ours with R1 at every 16th step (lazy) to 16 steps with R1 at every step. Ends with a line of
JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import sys
import time
from pathlib import Path

import jax
import numpy as np
import torch
import torch_gans

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ssl_jax.engine import loop, optim, sharding
from ssl_jax.experiment.config import load
from ssl_jax.methods import build_method

CLASSES = 10
BIGGAN = dict(channels=32, multiples=(8, 4, 2, 1), embedding=32), dict(channels=32, multiples=(1, 2, 4, 8)), 64
STYLEGAN = dict(channel_base=2048, channel_max=128), dict(features=128, mapping_layers=4)
CYCLE = 16  # steps with every lazy phase of StyleGAN2 at least once


def config_of(name: str, size: int, batch: int):
    config = load(str(Path(__file__).parents[1] / "configs" / f"{name}.py:cifar10_small"))
    with config.unlocked():
        config.batch_size, config.dtype, config.views = batch, "float32", ((),)
        config.data.image_shape, config.data.num_classes = (size, size, 3), CLASSES
        if name == "biggan":
            config.model.generator = dict(name="biggan", **BIGGAN[0])
            config.model.discriminator = dict(name="biggan", **BIGGAN[1])
            config.model.latent.size = BIGGAN[2]
        else:
            config.model.generator = dict(name="stylegan2", **STYLEGAN[0], **STYLEGAN[1])
            config.model.discriminator = dict(name="stylegan2", **STYLEGAN[0], group=4, residual=True)
            config.model.latent.size, config.model.mixing = STYLEGAN[1]["features"], 0.0
            config.model.augment = dict(policy=(), target=0.0)
            config.model.path_length = dict(weight=2.0, interval=4)
            config.model.r1 = dict(weight=1.0, interval=16)
    return config


def ours(config, steps: int):
    """(function that runs `steps` steps, number of parameters)"""
    method = build_method(config)
    shapes = {"image": ((config.batch_size, *config.data.image_shape), np.uint8), "label": ((config.batch_size,), np.int32)}
    generator = np.random.default_rng(0)
    batch = {name: generator.integers(0, CLASSES if name == "label" else 256, shape, kind)
             for name, (shape, kind) in shapes.items() if name in method.inputs}  # fmt: skip
    make = functools.partial(optim.make_optimizers, config.optim, total=1000, batch_size=config.batch_size, examples=1000)
    run, _ = loop.compile_run(method, make, sharding.make_mesh({}, jax.devices()[:1]), config.sharding, 0, batch)
    state = run.init()

    def cycle() -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = run.step(state, batch, run.root)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    return cycle, sum(x.size for x in jax.tree.leaves(state.params))


def adam(network, spec):
    return torch.optim.Adam(network.parameters(), spec["lr"], (spec["b1"], spec["b2"]))


def size_of(*networks) -> int:
    return sum(p.numel() for network in networks for p in network.parameters())


def average(ema, network, decay=0.999):
    with torch.no_grad():
        for mean, p in zip(ema.parameters(), network.parameters(), strict=True):
            mean.lerp_(p, 1 - decay)


def biggan_reference(config):
    generator = torch_gans.BigGANGenerator(**BIGGAN[0], classes=CLASSES, latent=BIGGAN[2])
    discriminator = torch_gans.BigGANDiscriminator(**BIGGAN[1], halved=3, classes=CLASSES)
    ema = torch_gans.BigGANGenerator(**BIGGAN[0], classes=CLASSES, latent=BIGGAN[2])
    for network in (generator, discriminator):
        network.to(memory_format=torch.channels_last)
    optimizer_g, optimizer_d = adam(generator, config.optim.generator), adam(discriminator, config.optim.discriminator)
    n = config.batch_size
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (n,))

    def sample_latents():
        return torch.randn(n, BIGGAN[2]), torch.randint(0, CLASSES, (n,))

    def step():
        real, (z, y) = images.float() / 127.5 - 1, sample_latents()
        with torch.no_grad():
            fake = generator(z, y)
        on_real, on_fake = discriminator(real, labels), discriminator(fake, y)
        loss = torch.relu(1 - on_real).mean() + torch.relu(1 + on_fake).mean()
        optimizer_d.zero_grad(set_to_none=True)
        loss.backward()
        optimizer_d.step()
        z, y = sample_latents()
        discriminator.requires_grad_(False)
        loss = -discriminator(generator(z, y), y).mean()
        optimizer_g.zero_grad(set_to_none=True)
        loss.backward()
        optimizer_g.step()
        discriminator.requires_grad_(True)
        average(ema, generator)

    return timed(step, 1), size_of(generator, discriminator)


def stylegan2_reference(config):
    def make():
        return torch_gans.StyleGAN2(64, STYLEGAN[0]["channel_base"], STYLEGAN[0]["channel_max"], *STYLEGAN[1].values())

    generator, ema = make(), make()
    discriminator = torch_gans.StyleGAN2Discriminator(64, STYLEGAN[0]["channel_base"], STYLEGAN[0]["channel_max"], 4)
    for network in (generator, discriminator):
        network.to(memory_format=torch.channels_last)
    optimizer_g, optimizer_d = adam(generator, config.optim.generator), adam(discriminator, config.optim.discriminator)
    n, layers = config.batch_size, 2 * len(generator.resolutions)
    images = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    length, count = torch.zeros(()), 0

    def styles(count):
        return generator.map(torch.randn(count, STYLEGAN[1]["features"]))[:, None].expand(-1, layers, -1)

    def update(optimizer, loss):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def step():
        nonlocal length, count
        softplus = torch.nn.functional.softplus
        discriminator.requires_grad_(False)
        update(optimizer_g, softplus(-discriminator(generator.synthesize(styles(n)))).mean())
        if count % 4 == 0:
            ws = styles(n // 2)
            fake = generator.synthesize(ws)
            noise = torch.randn_like(fake) / 64
            (gradient,) = torch.autograd.grad((fake * noise).sum(), ws, create_graph=True)
            lengths = gradient.square().sum(2).mean(1).sqrt()
            average_length = length + 0.01 * (lengths.mean() - length)
            update(optimizer_g, 2 * 4 * (lengths - average_length).square().mean())
            length = average_length.detach()
        discriminator.requires_grad_(True)
        real = images.float() / 127.5 - 1
        with torch.no_grad():
            fake = generator.synthesize(styles(n))
        update(optimizer_d, softplus(-discriminator(real)).mean() + softplus(discriminator(fake)).mean())
        if count % 16 == 0:
            real = real.requires_grad_(True)
            (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
            update(optimizer_d, 16 * 0.5 * config.model.r1.weight * gradient.square().sum((1, 2, 3)).mean())
        average(ema, generator)
        count += 1

    return timed(step, CYCLE), size_of(generator, discriminator)


def timed(step, steps):
    def cycle() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - began

    return cycle


CASES = {"biggan_32": ("biggan", 32, 32, 1, biggan_reference), "stylegan2_64": ("stylegan", 64, 16, CYCLE, stylegan2_reference)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    results = {}
    for case in args.cases:
        name, size, batch, steps, reference = CASES[case]
        config = config_of(name, size, batch)
        (first, count), (second, other) = ours(config, steps), reference(config)
        assert count == other, f"{case}: {count:,} parameters, the reference has {other:,}"
        first(), second()  # compile, allocate
        times = np.array([(first(), second()) for _ in range(args.pairs)]) / steps
        ratio = times[:, 1] / times[:, 0]
        load = os.getloadavg()[0]
        results[case] = dict(parameters=count, ours=np.median(times[:, 0]), reference=np.median(times[:, 1]),
                             ratio=np.median(ratio), low=ratio.min(), high=ratio.max(), load=load)  # fmt: skip
        print(f"{case}: {count:,} parameters, batch {batch}: ours {1000 * results[case]['ours']:.1f} ms a step, PyTorch "
              f"{1000 * results[case]['reference']:.1f} ms, ratio {results[case]['ratio']:.2f} "
              f"[{ratio.min():.2f}, {ratio.max():.2f}], load {load:.1f}", flush=True)  # fmt: skip
        if name == "stylegan":
            with config.unlocked():
                config.model.r1.interval = 1
            every, _ = ours(config, steps)
            every()
            pairs = np.array([(first(), every()) for _ in range(args.pairs)]) / steps
            cost = pairs[:, 1] / pairs[:, 0]
            results["r1_every_step"] = dict(lazy=np.median(pairs[:, 0]), every=np.median(pairs[:, 1]), ratio=np.median(cost))
            print(f"R1 at every step instead of every {CYCLE}th: {np.median(cost):.2f} [{cost.min():.2f}, {cost.max():.2f}] "
                  "times the time", flush=True)  # fmt: skip
    print(json.dumps({case: {k: float(v) for k, v in figures.items()} for case, figures in results.items()}))


if __name__ == "__main__":
    main()
