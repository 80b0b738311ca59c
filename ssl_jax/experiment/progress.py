"""Progress of a run: a bar with loss, images/s, time left and memory on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Mapping

import jax
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)


def memory() -> str:
    """Peak memory of the first device, or of this process where the device has no statistics."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return f"{stats['peak_bytes_in_use'] / 2**30:.1f} GiB device"
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB host"


class Progress:
    """A context manager; call `update(step, metrics)` at every logged step."""

    def __init__(self, start: int, total: int, batch_size: int):
        self.total, self.batch_size = total, batch_size
        self.bar = Bar(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self.task = self.bar.add_task("train", total=total, completed=start, text="compiling")

    def __enter__(self):
        self.bar.start()
        return self

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        losses = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.endswith("/loss"))
        text = f"{losses}  {metrics['time/images_per_second']:,.0f} images/s  {memory()}"
        self.bar.update(self.task, completed=step, text=text)
        if self.bar.disable:
            left = (self.total - step) * self.batch_size / metrics["time/images_per_second"]
            log.info("step %d/%d  %s  %d:%02d left", step, self.total, text, left // 60, left % 60)

    def __exit__(self, *_):
        self.bar.stop()
