"""Names and values of users in messages and logs: a line stays a line, and a terminal gets no commands."""

import json
import logging

import pytest

from launch import main
from ssl_jax.errors import MachineFault, PrintableFormatter, UserError, printable
from ssl_jax.experiment.config import from_plain
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.workdir import lock_workdir


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ü, 火, \N{NO-BREAK SPACE}", "plain, ü, 火, \N{NO-BREAK SPACE}"),
        ("a\nb\r\tc\x00", r"a\nb\r\tc\x00"),
        ("\x1b[2J\x1b]0;title\x07\x9b1m", r"\x1b[2J\x1b]0;title\x07\x9b1m"),
        ("\u202egnp.\u2028\ufeff\ud800", r"\u202egnp.\u2028\ufeff\ud800"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable(text) == shown
    assert str(UserError(text)) == str(MachineFault(text)) == shown


def test_a_log_record_is_one_line_and_a_traceback_keeps_its_lines(tmp_path):
    log = logging.getLogger("ssl_jax.test_printable")
    with lock_workdir(tmp_path):
        try:
            log.warning("class %s", "a\n2026-01-01 00:00:00,000 ERROR forged\x1b[2J")
            try:
                raise ValueError("cause")
            except ValueError:
                log.exception("failed")
        finally:
            handler = logging.getLogger("ssl_jax").handlers[-1]
            logging.getLogger("ssl_jax").removeHandler(handler)
            handler.close()
    first, second, *trace = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith(r"WARNING class a\n2026-01-01 00:00:00,000 ERROR forged\x1b[2J")
    assert second.endswith("ERROR failed") and trace[0].startswith("Traceback") and trace[-1] == "ValueError: cause"
    assert isinstance(handler.formatter, PrintableFormatter)


@pytest.mark.parametrize("verb", ["train", "evaluate", "export", "sample", "report", "status", "logs", "cancel"])
def test_a_workdir_with_control_characters_is_one_line(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--config=configs/simclr.py:smoke"] if verb == "train" else []
    assert main([verb, "--workdir=a\nerror: forged\x1b[2J", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "control character" in line and "\x1b" not in line
    assert not list(tmp_path.iterdir())


def test_the_table_of_evaluations_shows_names_as_they_are(tmp_path, capsys):
    name = "[red]\x1b[2J"
    entry = {"subject": "trained", "step": 4, "metrics": {f"{name}/top1": 50.0}, "protocols": {name: "k=20 [/x]\x1b[2J"}}
    (tmp_path / "evaluations.json").write_text(json.dumps([entry]))
    Evaluations(tmp_path, {}).show(from_plain({"method": name, "data": {"name": name}, "references": {}}))
    shown = capsys.readouterr().out
    assert r"[red]\x1b[2J: k=20 [/x]\x1b[2J" in shown and "\x1b" not in shown
