"""A Slurm of one node: submit, requeue, time limit, cancel, bad input, two processes, a sweep as an array.

`python -m pytest -m slow -s tests/test_slurm.py`, as root, after `apt-get install slurm-wlm`; it starts and stops a Slurm of its own
(benchmarks/slurm_node.sh).
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from xla_flags import flags

ROOT = pathlib.Path(__file__).parent.parent
NODE = ROOT / "benchmarks" / "slurm_node.sh"
STEPS = 60
missing = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (apt-get install slurm-wlm)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="benchmarks/slurm_node.sh wants root"),
]


@pytest.fixture(scope="module", autouse=True)
def node(tmp_path_factory):
    directory = tmp_path_factory.mktemp("slurm")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(directory / "slurm.conf")
    started = subprocess.run(
        [NODE, "start", directory], env={**os.environ, "SLURM_NODE_PORT": "17817"}, capture_output=True, text=True
    )
    assert started.returncode == 0, started.stderr
    yield
    subprocess.run([NODE, "stop", directory], check=True)
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before


def launch(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(1)}
    done = subprocess.run(
        [sys.executable, "launch.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def submit(workdir, *flags, steps=STEPS):
    every = [f"--config.{name}={steps} steps" for name in ("total", "evaluate_every", "checkpoint_every")]
    launch(
        "submit",
        "--to=slurm",
        "--config=configs/simclr.py:smoke",
        f"--workdir={workdir}",
        "--config.baselines=()",
        *every,
        *flags,
    )
    return json.loads((workdir / "job.json").read_text())["id"]


def lines(workdir):
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def until(condition, message, seconds=900):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.5)


def wait_for_step(workdir, step):
    until(lambda: len(lines(workdir)) >= step, lambda: launch("logs", f"--workdir={workdir}"))


def job_fields(job):
    shown = subprocess.run(
        ["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=True
    ).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def wait_for_end(workdir, job):
    final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    until(lambda: job_fields(job)["JobState"] in final, lambda: launch("logs", f"--workdir={workdir}"))
    return job_fields(job)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The workdir of an undisturbed job."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    fields = wait_for_end(workdir, submit(workdir))
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "0")
    assert [row["step"] for row in lines(workdir)] == list(range(1, STEPS + 1))
    return workdir


def test_requeued_job_resumes_to_the_same_curve(undisturbed, tmp_path):
    """It saves, resumes, and has the numbers of the undisturbed job."""
    workdir = tmp_path / "run"
    job = submit(workdir)
    wait_for_step(workdir, 5)
    assert "running" in launch("status", f"--workdir={workdir}")
    subprocess.run(["scontrol", "requeue", job], check=True)
    fields = wait_for_end(workdir, job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1")
    log = launch("logs", f"--workdir={workdir}", "--lines=10000")
    saved = int(log.split("SIGTERM at step ")[1].split(":")[0])
    assert f"going on at step {saved} of {STEPS}" in log and 5 <= saved < STEPS
    print(f"requeued at step {saved}")
    assert lines(workdir) == lines(undisturbed)
    assert "completed, restarted 1 times, exit code 0" in launch("status", f"--workdir={workdir}")


def test_job_at_its_time_limit_requeues_itself(tmp_path):
    """Slurm sends SIGTERM, and the job requeues itself."""
    workdir = tmp_path / "run"
    job = submit(workdir, "--time=2", "--signal=TERM@30", steps=100000)
    until(lambda: job_fields(job)["Restarts"] == "1", lambda: launch("logs", f"--workdir={workdir}"))
    until(
        lambda: "going on at step" in launch("logs", f"--workdir={workdir}"),
        lambda: launch("logs", f"--workdir={workdir}"),
    )
    log = launch("logs", f"--workdir={workdir}", "--lines=100000")
    saved = int(log.split("SIGTERM at step ")[1].split(":")[0])
    assert f"going on at step {saved} of" in log
    print(f"warned at step {saved}")
    launch("cancel", f"--workdir={workdir}")
    assert wait_for_end(workdir, job)["JobState"] == "CANCELLED"


def test_canceled_job_saves_and_resumes_when_submitted_again(tmp_path):
    """It saves and is not requeued; submitted again it resumes."""
    workdir = tmp_path / "run"
    job = submit(workdir, steps=2000)
    wait_for_step(workdir, 5)
    launch("cancel", f"--workdir={workdir}")
    assert wait_for_end(workdir, job)["JobState"] == "CANCELLED" and job_fields(job)["Restarts"] == "0"
    saved = int(launch("logs", f"--workdir={workdir}").split("SIGTERM at step ")[1].split(":")[0])
    job = submit(workdir, steps=2000)
    wait_for_step(workdir, saved + 1)
    assert f"going on at step {saved} of" in launch("logs", f"--workdir={workdir}")
    launch("cancel", f"--workdir={workdir}")
    wait_for_end(workdir, job)


def test_bad_input_is_not_requeued(tmp_path):
    workdir = tmp_path / "run"
    fields = wait_for_end(workdir, job := submit(workdir, "--config.data.name=/no/such/folder"))
    assert (fields["JobState"], fields["ExitCode"], job_fields(job)["Restarts"]) == ("FAILED", "2:0", "0")


def test_requeued_job_of_two_processes(undisturbed, tmp_path):
    """JAX joins the tasks of srun; SIGTERM saves in both."""
    workdir = tmp_path / "run"
    job = submit(workdir, "--processes_per_node=2")
    wait_for_step(workdir, 5)
    subprocess.run(["scontrol", "requeue", job], check=True)
    fields = wait_for_end(workdir, job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    log = launch("logs", f"--workdir={workdir}", "--lines=10000")
    assert "process 0 of 2 (Slurm)" in log and "SIGTERM at step" in log and "going on at step" in log
    print("requeued", log.split("SIGTERM at ")[1].split(":")[0])
    ours, theirs = lines(workdir), lines(undisturbed)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours[:10], theirs[:10], strict=True):
        assert a["ssl/loss"] == pytest.approx(b["ssl/loss"], rel=1e-4)


def test_sweep_is_one_array_whose_runs_requeue_alone(tmp_path):
    """One of four runs is requeued and resumes; one value fails and leaves the others; the same command sends only what is not done."""
    workdir = tmp_path / "sweep"
    every = [f"--config.{name}={STEPS} steps" for name in ("total", "evaluate_every", "checkpoint_every")]
    given = ("sweep", "--to=slurm", "--config=configs/simclr.py:smoke", "--seeds=2", f"--workdir={workdir}", "--config.baselines=()")
    launch(*given, "--vary=optim.net.lr=1e-3,1e30", *every)
    plan = json.loads((workdir / "sweep.json").read_text())
    good, bad = ([workdir / run["workdir"] for run in plan["runs"] if run["name"].endswith(end)] for end in ("=1e-3", "=1e30"))
    array = json.loads((workdir / "job.json").read_text())["id"]
    until(lambda: len(lines(good[0])) >= 5, lambda: launch("status", f"--workdir={workdir}"))
    subprocess.run(["scontrol", "requeue", f"{array}_0"], check=True)

    def ended():
        shown = subprocess.run(["scontrol", "show", "job", "--oneliner", array], capture_output=True, text=True, check=True).stdout
        states = [word.partition("=")[2] for word in shown.split() if word.startswith("JobState=")]
        return len(states) == 4 and set(states) <= {"COMPLETED", "FAILED"}

    until(ended, lambda: launch("status", f"--workdir={workdir}"), 3000)
    shown = launch("status", f"--workdir={workdir}")
    assert "4 runs: 2 done, 2 failed" in shown and "2 completed, 2 failed" in shown
    assert shown.count("is nan") + shown.count("is inf") == 2
    assert "going on at step" in (good[0] / "output.txt").read_text() and "going on" not in (good[1] / "output.txt").read_text()
    assert all(len(lines(run)) == STEPS for run in good) and not any((run / "report.html").exists() for run in bad)
    script = launch(*given, "--vary=optim.net.lr=1e-3,1e30,2e-3", *every, "--dry_run")
    assert "#SBATCH --array=0-3%4" in script
