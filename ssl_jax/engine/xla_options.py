"""Options of XLA by name and platform: `config.xla`. They go to the compiler of the train step, not into the environment.

  default  what XLA does by itself
  overlap  collectives run beside arithmetic. On TPUs the group that MaxText recommends where parameters are sharded: gathers are
           asynchronous and fused into the loops that need them. On GPUs the scheduler that hides latency, as in NVIDIA's JAX images

None of them changes a result beyond its rounding. `launch.py rehearse` compiles with them, too; nothing here has been timed.
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
    """The options of a set for 'cpu', 'gpu' or 'tpu'; a set says nothing about some.

    Raises:
        UserError: there is no such set.
    """
    if name not in SETS:
        raise UserError(f"config.xla={name!r} is unknown; choose of {', '.join(SETS)}")
    return dict(SETS[name].get(platform, {}))
