"""Compile the train step of a config for devices that are not there and print what it needs. Needs no data, weights or accelerator.

  python launch.py rehearse --config=configs/simclr.py:imagenet --topology=cpu:8
  python launch.py rehearse --config=configs/vq_prior.py:imagenet256_base --topology=v5e:16x16 --output=rehearsal.json
  python launch.py rehearse --config=configs/supervised.py:imagenet_vit_g14 --topology=v5p:4x4x4 --fit

The step is the one that `train` runs: the same method, optimizers, shardings and donated state, with `config.mesh` over all devices
of the topology. A stage without a workdir takes the config of its recipe. The sizes of common datasets are known; for others give
--config.data.examples=N (and data.num_classes, data.image_shape).

TPUs need their compiler, libtpu (requirements-rehearse.txt), but no TPU. Without libtpu as many fake CPU devices take their place.
GPUs (h100:HOSTSxGPUS, h200) need requirements-rehearse-gpu.txt. They are rehearsed with XLA's attention. cuDNN's, which needs a
GPU, takes less memory for long sequences.

The predicted step time is the bound of the slowest of arithmetic, memory and network, with the band that published TPU runs
reached; for several GPUs without the network. Exit code 1: the step does not fit into the memory, of GPUs into the share that JAX
takes (75 %, or XLA_CLIENT_MEM_FRACTION).

--fit tries meshes, batches (half, twice) and rematerializations, and prints those that fit by predicted images per second. Another
batch size is another recipe: learning rates are scaled as the config says.
"""

from __future__ import annotations

import sys

from ssl_jax.cli.main import file, number, whole
from ssl_jax.rehearsal.chips import DECODED, EXAMPLES


def add_arguments(sub) -> None:
    sub.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:VARIANT; --config.KEY=VALUE overrides")
    sub.add_argument("--topology", required=True, help=f"devices to compile for: {EXAMPLES}")
    sub.add_argument(
        "--slices", type=whole("--slices", 1, 4096), default=1,
        help="number of slices, joined by the network of their hosts (default: 1)",
    )  # fmt: skip
    sub.add_argument("--fit", action="store_true", help="search for meshes, batches and rematerializations that fit")
    sub.add_argument("--effort", choices=("quick", "full"), default="quick", help="of the compiler (default: quick)")
    sub.add_argument(
        "--decode-rate", type=number("--decode-rate", positive=True), default=DECODED,
        help=f"images per second that one CPU core decodes (default: {DECODED:.0f})",
    )  # fmt: skip
    sub.add_argument("--output", type=file("--output"), help="JSON file for the results")


def main(args, overrides) -> int:
    from ssl_jax.engine.checkpoint import write_json  # imports JAX, which --help avoids
    from ssl_jax.experiment.rehearse import rehearse_config
    from ssl_jax.report.rehearsal_tables import show, show_fit

    choices = (args.slices, args.fit, args.effort == "quick", args.decode_rate)
    facts, remedy = rehearse_config(args.config, overrides, args.topology, *choices)
    (show_fit if args.fit else show)(facts, sys.stdout)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, facts)
    if remedy:
        print(f"error: {remedy}", file=sys.stderr)
    return 1 if remedy else 0
