"""Which keys of a config may differ when a run is started again in its workdir."""

import json

import pytest

from ssl_jax.errors import UserError
from ssl_jax.experiment.workdir import note_stop, record_config

CONFIG = {
    "method": "simclr", "model": {},
    "total": "4 steps", "batch_size": 8, "seed": 0, "on_nonfinite": "stop", "data": {"examples": 64}, "optim": {"net": {"lr": 0.1}},
}  # fmt: skip
OTHER = {
    "total": {"total": "8 steps"}, "lr": {"optim": {"net": {"lr": 0.01}}}, "skip": {"on_nonfinite": "skip"}, "seed": {"seed": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("saved", "stopped", "accepted"),
    [
        ((), False, {"total", "lr", "skip", "seed"}),  # failed before anything was saved
        ((2,), False, set()),
        ((2, 4), False, {"total"}),  # finished: may become longer
        ((2,), True, {"lr", "skip"}),  # ended by a NaN: its message names these flags
    ],
)
def test_keys_that_may_differ_from_the_last_start(tmp_path, caplog, saved, stopped, accepted):
    caplog.set_level("INFO")
    for name, change in OTHER.items():
        workdir = tmp_path / name
        for step in saved:
            (workdir / "checkpoints" / str(step)).mkdir(parents=True)
        workdir.mkdir(exist_ok=True)
        record_config(workdir, CONFIG, 4)
        note_stop(workdir, "loss is nan" if stopped else None)
        steps = 8 if name == "total" else 4
        if name not in accepted:
            with pytest.raises(UserError, match="was started with another config"):
                record_config(workdir, CONFIG | change, steps)
            continue
        caplog.clear()
        record_config(workdir, CONFIG | change, steps)
        assert "another config than at the last start: " in caplog.text
        assert json.loads((workdir / "config.json").read_text()) == CONFIG | change
    if "total" in accepted and saved:
        (tmp_path / "total" / "checkpoints" / "8").mkdir()
        with pytest.raises(UserError, match="total: 8 steps -> 4 steps"):  # shorter is no extension
            record_config(tmp_path / "total", CONFIG, 4)


def test_checkpoints_that_are_on_another_disk_keep_their_config(tmp_path):
    (tmp_path / "checkpoints.json").write_text("{}")
    record_config(tmp_path, CONFIG, 4)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        record_config(tmp_path, CONFIG | {"seed": 1}, 4)
