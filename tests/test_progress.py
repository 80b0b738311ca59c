"""The progress lines where there is no terminal."""

import logging

from ssl_jax.experiment.progress import Progress


def test_progress_line_has_losses_speed_memory_and_time_left(caplog):
    metrics = {"ssl/loss": 1.25, "ssl/grad_norm/net": 3.0, "time/images_per_second": 64.0, "time/seconds_per_step": 100.0}
    with caplog.at_level(logging.INFO, logger="ssl_jax"), Progress(start=0, total=100, batch_size=32) as progress:
        progress.update(10, metrics)
    (line,) = caplog.messages
    assert line.startswith("step 10/100  ssl/loss 1.2500  64 images/s  ") and "GiB" in line
    assert line.endswith("0:45 left")  # 90 steps of 32 images at 64 images/s; seconds_per_step is not used
    assert "grad_norm" not in line
