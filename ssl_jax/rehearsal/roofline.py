"""How long a step takes at least, and what a run costs: a prediction, until one on the hardware replaces it."""

from __future__ import annotations

from collections.abc import Sequence

from ssl_jax.rehearsal.chips import Chip
from ssl_jax.rehearsal.collectives import BETWEEN_SLICES, Collective

# Share of XLA's own optimum that six published runs of ResNet-50, BiT, ViT-S/16 and SimCLR on TPUs v2 and v3 reached, evaluation and
# start included: Flax 47, 69 and 76 %, big_vision 41 and 55-64 %, SimCLR 32 % (their READMEs, configs and paper).
REACHED = (0.32, 0.76)


def times(chip: Chip, flops: float, moved: float, found: Sequence[Collective]) -> dict[str, float]:
    """Seconds of a step that each resource of a device is busy for at least, were nothing else in its way.

    Args:
      flops: of one device.
      moved: bytes between one device and its memory.
      found: collectives of a step. They are taken to use all links of a chip at once, which a ring along one axis does not.

    'network' and 'slices', the network between slices, are left out where their speed is not known.
    """
    between = sum(x.wire for x in found if x.kind == BETWEEN_SLICES)
    busy = {"compute": flops / chip.flops, "memory": moved / chip.bandwidth}
    if chip.network:
        busy["network"] = sum(x.wire for x in found if x.kind != BETWEEN_SLICES) / chip.network
    return busy | ({"slices": between / chip.between} if between and chip.between else {})


def moved_bytes(accessed: float, counted: float, flops: float) -> float:
    """XLA's count of bytes accessed, which has the body of each loop once, times what the loops add to the FLOPs.

    Args:
      accessed, counted: bytes and FLOPs of XLA's cost analysis, of one device.
      flops: those of one device with loops counted as often as they run.

    The count has what passes through memory on the chip, too: it is an estimate from above.
    """
    return accessed * max(1.0, flops / counted) if counted else accessed


def predict(busy: dict[str, float], steps: int, batch_size: int, devices: int, chips: int, model_flops: float, chip: Chip) -> dict:
    """Of a run of `steps`: the bound of the longest of `busy`, and the band that published runs lead one to expect.

    `mfu`: `model_flops` (of all devices, nothing computed twice) of a step over what the devices could do in its time. Where several
    devices have a network that is not in `busy` ('network': False), the band, which is one of whole bounds, is left out.
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
    """What each host has to decode, and on how many cores at `rate` images per second and core."""
    each = images_per_second / hosts
    return {"hosts": hosts, "images_per_second": each, "cores": each / rate, "rate_of_core": rate}
