"""A roofline model: the minimal time of a step and the cost of a run. Measurements on the hardware should replace it."""

from __future__ import annotations

from collections.abc import Sequence

from ssl_jax.rehearsal.chips import Chip
from ssl_jax.rehearsal.collectives import BETWEEN_SLICES, Collective

# The share of the roofline bound that six published runs of ResNet-50, BiT, ViT-S/16 and SimCLR on TPUs v2 and v3 reached,
# including evaluation and startup: Flax 47, 69 and 76 %, big_vision 41 and 55-64 %, SimCLR 32 % (their READMEs, configs and paper).
REACHED = (0.32, 0.76)


def times(chip: Chip, flops: float, moved: float, found: Sequence[Collective]) -> dict[str, float]:
    """{resource: seconds of a step for which it is busy at least}, for the resources 'compute', 'memory', 'network' and 'slices'.

    Args:
      flops: per device and step.
      moved: bytes per step between a device and its memory.
      found: collectives of a step. They are assumed to use all links of a chip at once, although a ring along one axis does not.

    'network' (within a slice) and 'slices' (between slices) are absent if their speed is unknown.
    """
    between = sum(x.wire for x in found if x.kind == BETWEEN_SLICES)
    busy = {"compute": flops / chip.flops, "memory": moved / chip.bandwidth}
    if chip.network:
        busy["network"] = sum(x.wire for x in found if x.kind != BETWEEN_SLICES) / chip.network
    return busy | ({"slices": between / chip.slice_network} if between and chip.slice_network else {})


def moved_bytes(accessed: float, counted: float, flops: float) -> float:
    """An upper estimate of the bytes per step between a device and its memory.

    XLA's count has the body of each loop once, so it is scaled by the ratio of FLOPs with and without repetitions. It is an upper
    estimate because XLA also counts traffic to on-chip memory.

    Args:
      accessed, counted: bytes and FLOPs per device, from XLA's cost analysis.
      flops: FLOPs per device with loops counted as often as they run.
    """
    return accessed * max(1.0, flops / counted) if counted else accessed


def predict(busy: dict[str, float], steps: int, batch_size: int, devices: int, chips: int, model_flops: float, chip: Chip) -> dict:
    """{'binding', 'bound', 'expected', 'reached', 'network'} of a run of `steps`.

    'binding' is the busiest resource, and 'bound' the speed if it never idles. 'expected' are the speeds at the shares 'reached' of
    that bound (see REACHED), slowest last. 'network' is False if `busy` lacks the network of several devices; then 'expected' is
    empty, since REACHED refers to bounds that include the network.

    Each speed has 'mfu' (model FLOPs utilization): `model_flops`, those of a step on all devices without rematerialization, over
    the peak of the devices.
    """
    whole = devices == 1 or chip.network is not None
    binding = max(busy, key=busy.get)

    def at(reached: float) -> dict:
        seconds = busy[binding] / reached
        hours = steps * seconds / 3600
        return {
            "step_seconds": seconds,
            "images_per_second": batch_size / seconds,
            "mfu": model_flops / (seconds * devices * chip.flops),
            "hours": hours,
            "chip_hours": hours * chips,
        }

    band = REACHED if whole else ()
    expected = [at(reached) for reached in reversed(band)]
    return {"binding": binding, "bound": at(1.0), "expected": expected, "reached": list(band), "network": whole}


def hosts_need(images_per_second: float, hosts: int, rate: float) -> dict:
    """Images per second that each host has to decode, and the cores for it at `rate` images per second and core."""
    each = images_per_second / hosts
    return {"hosts": hosts, "images_per_second": each, "cores": each / rate, "rate_of_core": rate}
