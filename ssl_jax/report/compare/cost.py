"""What a run has cost: images, operations, seconds of its devices, time from the first start to the last step."""

from __future__ import annotations

import re
from typing import NamedTuple

from ssl_jax.report.compare.runs import Run


class Cost(NamedTuple):
    """None where the workdir does not say."""

    steps: int
    images: int | None
    flops: int | None  # of the matrix products and convolutions of all steps, on all devices together
    devices: int | None
    device_seconds: float | None  # time in steps times the number of devices
    elapsed: float | None  # seconds from the first start to the last logged step, with everything between


def cost(run: Run, step: int | None = None) -> Cost:
    """Up to `step`, or all that is logged; from metrics.jsonl, starts.jsonl and provenance.json of the run."""
    record = run.record
    if step is not None:
        record = record._replace(lines=[line for line in record.lines if line["step"] <= step])
    batch, seconds = record.count("batch_size"), record.seconds
    found = re.match(r"(\d+) x ", str(record.provenance.get("devices", "")))
    devices = int(found[1]) if found else None
    starts = [start["time/clock"] for start in record.starts]
    ends = [line["time/clock"] for line in record.lines if "time/clock" in line]
    elapsed = max(ends) - min(starts) if starts and ends and max(ends) > min(starts) else None
    spent = seconds * devices if seconds and devices else None
    of_a_step = record.provenance.get("step_flops")
    flops = of_a_step * record.step if isinstance(of_a_step, int) else None
    return Cost(record.step, batch * record.step if batch else None, flops, devices, spent, elapsed)
