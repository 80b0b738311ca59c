"""Named sets of XLA options by platform, for `config.xla`. They go to the compiler of the train step, not into the environment.

  default  XLA's defaults
  overlap  collectives overlap with computation. On TPUs: the options that MaxText recommends for sharded parameters; gathers
           become asynchronous and are fused into the loops that need them. On GPUs: the latency-hiding scheduler, as in NVIDIA's
           JAX images.

They change results by rounding only. `launch.py rehearse` compiles with them, too. Their speed has not been measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from ssl_jax.errors import UserError

SETS: Mapping[str, Mapping[str, Mapping[str, bool]]] = {
    "default": {},
    "overlap": {
        "tpu": {
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
            "xla_enable_async_all_gather": True,
        },
        "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    },
}


def xla_options(name: str, platform: str) -> dict[str, bool]:
    """The options of the set `name` for `platform` ('cpu', 'gpu' or 'tpu'); {} if the set has none for it.

    Raises:
        UserError: there is no such set.
    """
    if name not in SETS:
        raise UserError(f"config.xla={name!r} is unknown; choose one of {', '.join(SETS)}")
    return dict(SETS[name].get(platform, {}))
