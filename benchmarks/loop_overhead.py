"""What the training loop costs over its bare step: the same compiled step on a resident batch, and in `loop.train`.

  python benchmarks/loop_overhead.py [--config=configs/simclr.py] [--steps=40] [--rounds=3]

In the loop batches are read, placed and prefetched, metrics fetched, checked and written; no evaluation, and one checkpoint at the end
that is left out of the time. The two are timed in turns; a ratio of 1.03 is an overhead of 3 %.
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
    """Saves nothing: what a save costs is another benchmark."""

    def save(self, *_):
        pass

    wait = save


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/simclr.py")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args, overrides = parser.parse_known_args()
    this = build_experiment(configs.load(args.config, overrides))
    settings = {**configs.plain(this.config), "evaluate_every_steps": 10**9, "checkpoint_every_steps": 10**9}
    state = this.run.init()
    for batch in loop.to_device(iterate(this.batches, 0, 2), this.run.mesh):  # compiled and warm
        state, metrics = this.run.step(state, batch, this.run.root)
    jax.block_until_ready(metrics)
    bare, looped, step = [], [], 2
    for _ in range(args.rounds):
        began = time.perf_counter()
        for _ in range(args.steps):
            state, metrics = this.run.step(state, batch, this.run.root)
        jax.block_until_ready((state, metrics))
        bare.append((time.perf_counter() - began) / args.steps)
        step += args.steps
        with tempfile.TemporaryDirectory() as workdir, loop.Signals() as watch, Watchdog(pathlib.Path(workdir)) as watchdog:
            writer = MetricsWriter(pathlib.Path(workdir), step)
            batches = iterate(this.batches, step, step + args.steps, this.config.data.workers)
            began = time.perf_counter()
            state = loop.train(
                this.method, this.run, state, batches, step + args.steps, writer, NoCheckpoints(), settings, {},
                this.schedules, lambda *_: {}, lambda *_: None, watch, watchdog, Trace(pathlib.Path(workdir)),
            )  # fmt: skip
            jax.block_until_ready(state)
            looped.append((time.perf_counter() - began) / args.steps)
            writer.close()
        step += args.steps
    ratios = [b / a for a, b in zip(bare, looped, strict=True)]
    told = {"bare_ms": 1e3 * statistics.median(bare), "loop_ms": 1e3 * statistics.median(looped), "ratio": statistics.median(ratios)}
    print(json.dumps({"config": args.config, **{k: round(v, 4) for k, v in told.items()}, "ratios": [round(r, 4) for r in ratios]}))


if __name__ == "__main__":
    main()
