"""Overhead of the training loop: the same compiled step on a resident batch, and in `loop.train`.

  python benchmarks/loop_overhead.py [--config=configs/simclr.py] [--steps=40] [--rounds=3]

The loop reads, transfers and prefetches batches, and fetches, checks and writes metrics. It runs no evaluation and saves no
checkpoint. Both are timed in turns; a ratio of 1.03 is an overhead of 3 %.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

from ssl_jax.data.pipeline import iterate
from ssl_jax.engine import loop
from ssl_jax.engine.metrics import MetricsWriter
from ssl_jax.engine.timing import Trace
from ssl_jax.engine.watchdog import Watchdog
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment


class NoCheckpoints:
    """Saves nothing, because this benchmark does not time saving."""

    def save(self, *_):
        pass

    wait = save


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/simclr.py")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args, overrides = parser.parse_known_args()
    experiment = build_experiment(configs.load(args.config, overrides))
    settings = {**configs.plain(experiment.config), "evaluate_every_steps": 10**9, "checkpoint_every_steps": 10**9}
    state = experiment.run.init()
    for batch in loop.to_device(iterate(experiment.batches, 0, 2), experiment.run.mesh):  # compile and warm up
        state, metrics = experiment.run.step(state, batch, experiment.run.root)
    jax.block_until_ready(metrics)
    bare, looped, step = [], [], 2
    for _ in range(args.rounds):
        began = time.perf_counter()
        for _ in range(args.steps):
            state, metrics = experiment.run.step(state, batch, experiment.run.root)
        jax.block_until_ready((state, metrics))
        bare.append((time.perf_counter() - began) / args.steps)
        step += args.steps
        with tempfile.TemporaryDirectory() as workdir, loop.Signals() as watch, Watchdog(pathlib.Path(workdir)) as watchdog:
            writer = MetricsWriter(pathlib.Path(workdir), step)
            batches = iterate(experiment.batches, step, step + args.steps, experiment.config.data.workers)
            began = time.perf_counter()
            state = loop.train(
                experiment.method, experiment.run, state, batches, step + args.steps, writer, NoCheckpoints(), settings, {},
                experiment.schedules, lambda *_: {}, lambda *_: None, watch, watchdog, Trace(pathlib.Path(workdir)),
            )  # fmt: skip
            jax.block_until_ready(state)
            looped.append((time.perf_counter() - began) / args.steps)
            writer.close()
        step += args.steps
    ratios = [b / a for a, b in zip(bare, looped, strict=True)]
    figures = {"bare_ms": 1e3 * statistics.median(bare), "loop_ms": 1e3 * statistics.median(looped)}
    figures = {k: round(v, 4) for k, v in {**figures, "ratio": statistics.median(ratios)}.items()}
    print(json.dumps({"config": args.config, **figures, "ratios": [round(r, 4) for r in ratios]}))


if __name__ == "__main__":
    main()
