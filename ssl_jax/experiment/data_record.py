"""data.json of a workdir: what the training data were when the run began."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ssl_jax.data.source import Source
from ssl_jax.engine.checkpoint import write_json
from ssl_jax.errors import UserError

log = logging.getLogger(__name__)


def record_data(workdir: Path, source: Source) -> None:
    """Write the fingerprint of the training data, or check it against the one of this workdir.

    Raises:
        UserError: names, sizes or number of the files have changed since the run began.
    """
    path, now = workdir / "data.json", {"fingerprint": source.fingerprint, "examples": len(source), "split": source.split}
    if path.exists():
        try:
            before = json.loads(path.read_text())
            changed = before["fingerprint"] != now["fingerprint"]
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged, so it is not known whether the data are those that the run began with; writing it again", path)
            changed = False
        if changed:
            raise UserError(
                f"data '{source.name}' split '{source.split}' have changed since --workdir={workdir} was started: "
                f"{before.get('examples')} examples then, {len(source)} now, with other names or sizes of files; put the old data "
                f"back, use another --workdir, or remove {path} to go on with the new data"
            )
    write_json(path, now)
