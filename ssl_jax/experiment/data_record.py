"""data.json of a workdir: what the training data were when the run began."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from ssl_jax.data.source import Source
from ssl_jax.data.sources import is_path
from ssl_jax.engine.checkpoint import write_json
from ssl_jax.errors import MachineFault, UserError

log = logging.getLogger(__name__)


def check_there(workdir: Path, name: str) -> None:
    """Called before the data are opened. `name` is `config.data.name`.

    Raises:
        MachineFault: the run of `workdir` has read these files before, and now there are none, as where a disk is not mounted.
    """
    if is_path(name) and (workdir / "data.json").exists():
        try:
            empty = not any(os.scandir(os.path.expanduser(name)))
        except OSError:
            empty = True
        if empty:
            raise MachineFault(
                f"data '{name}' are gone since --workdir={workdir} was started; see that their disk is mounted, and run the same "
                "command again"
            )


def record_data(workdir: Path, source: Source) -> None:
    """Write the fingerprint of the training data, or check it against the one of this workdir, if that holds a checkpoint.

    Raises:
        UserError: names, sizes or number of the files have changed since the run began.
        MachineFault: the record cannot be read or written.
    """
    path, now = workdir / "data.json", {"fingerprint": source.fingerprint, "examples": len(source), "split": source.split}
    if path.exists():
        try:
            before = json.loads(path.read_text())
            changed = before["fingerprint"] != now["fingerprint"]
        except OSError as error:
            raise MachineFault(f"{path} cannot be read ({error.strerror}); repair it, and run the same command again") from error
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged, so it is not known whether the data are those that the run began with; writing it again", path)
            changed = False
        checkpoints = workdir / "checkpoints"
        if changed and checkpoints.is_dir() and any(child.name.isdigit() for child in checkpoints.iterdir()):
            raise UserError(
                f"data '{source.name}' split '{source.split}' have changed since --workdir={workdir} was started: "
                f"{before.get('examples')} examples then, {len(source)} now, with other names or sizes of files; put the old data "
                f"back, use another --workdir, or remove {path} to go on with the new data"
            )
    write_json(path, now)
