"""The lines that a person watches where there is no terminal."""

import logging

from ssl_jax.experiment.progress import Progress


def test_a_line_tells_losses_speed_memory_and_the_time_left(caplog):
    metrics = {"ssl/loss": 1.25, "ssl/grad_norm/net": 3.0, "time/images_per_second": 64.0, "time/seconds_per_step": 100.0}
    with caplog.at_level(logging.INFO, logger="ssl_jax"), Progress(start=0, total=100, batch_size=32) as progress:
        progress.update(10, metrics)
    (line,) = caplog.messages
    assert line.startswith("step 10/100  ssl/loss 1.2500  64 images/s  ") and "GiB" in line
    assert line.endswith("0:45 left")  # 90 steps of 32 images at the median speed, whatever the last interval was
    assert "grad_norm" not in line
