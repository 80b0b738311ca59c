"""Helpers of the tests of `launch.py submit`."""

import json
import pathlib
import time

from launch import main

ROOT = pathlib.Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "tests" / "data" / "jobset_v1alpha2.schema.json").read_text())
GKE = ("--to=gke", "--topology=v5e:16x16", "--image=registry/ssl_jax:1", "--claim=filestore")
TPU = ("--to=tpu-vm", "--vm=pod", "--zone=us-west4-a")


def submit(workdir, *flags, config="configs/simclr.py:smoke"):
    return main(["submit", f"--config={config}", f"--workdir={workdir}", *flags])


def dry(capsys, workdir, *flags, **more):
    """Returns what a dry run prints."""
    capsys.readouterr()
    assert submit(workdir, *flags, "--dry_run", **more) == 0
    return capsys.readouterr().out


def error(capsys):
    """Returns the single line of stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def calls(folder, name):
    """The arguments of each call of a program of the fixture `programs`."""
    path = folder / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []


def wait(workdir, capsys, *words, seconds=30.0):
    """Wait for a status that contains one of `words`, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        capsys.readouterr()
        assert main(["status", f"--workdir={workdir}"]) == 0
        status = capsys.readouterr().out
        if any(word in status for word in words):
            return status
        time.sleep(0.2)
    raise AssertionError(status)
