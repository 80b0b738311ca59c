"""Slurm, GKE and Cloud TPU with scripts in place of their programs: what is sent, and how answers are read."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import pytest
from submitting import GKE, ROOT, TPU, calls, dry, error, submit, wait

from launch import main
from ssl_jax import files
from ssl_jax.errors import not_written
from ssl_jax.launchers import detached


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


# ---------------------------------------------------------------------------------------------------- Slurm


def test_slurm_submits_what_the_dry_run_prints(tmp_path, capsys, programs):
    programs("srun"), programs("scancel")
    folder = programs("sbatch", "echo Submitted batch job 7")
    run = tmp_path / "run"
    shown = dry(capsys, run, "--to=slurm", "--partition=a100")
    assert submit(run, "--to=slurm", "--partition=a100") == 0
    assert "slurm job 7 submitted" in capsys.readouterr().out
    sent = (run / "slurm" / "7_submission.sh").read_text()
    assert sent in shown and len(calls(folder, "sbatch")) == 1
    from submitit.core.utils import DelayedSubmission  # not before the engine: see slurm._submitit

    task = DelayedSubmission.load(run / "slurm" / "7_submitted.pkl")
    assert task.function is os.execv and task.args[0] == sys.executable
    assert all(f"#   {argument!r}" in shown for argument in task.args[1])
    job = json.loads((run / "job.json").read_text())
    assert (job["engine"], job["id"], job["number"]) == ("slurm", "7", 1) and sent in job["sent"]
    assert job["command"][:2] == ["launch.py", "train"]

    programs("scontrol", "echo JobId=7 JobState=RUNNING Reason=None Restarts=2 ExitCode=0:0")
    assert main(["status", f"--workdir={run}"]) == 0
    assert capsys.readouterr().out == "slurm job 7: running, restarted 2 times\n"
    assert submit(run, "--to=slurm") == 2
    assert "slurm job 7" in (message := error(capsys)) and "launch.py cancel" in message
    assert main(["cancel", f"--workdir={run}"]) == 0
    assert calls(folder, "scancel") == ["7"]
    assert len(calls(folder, "sbatch")) == 1

    programs("scontrol", "echo JobId=7 JobState=FAILED Reason=NonZeroExitCode Restarts=0 ExitCode=2:0")
    capsys.readouterr()
    assert main(["cancel", f"--workdir={run}"]) == 0
    assert "had ended before: failed, NonZeroExitCode, exit code 2" in capsys.readouterr().out
    assert submit(run, "--to=slurm") == 0 and json.loads((run / "job.json").read_text())["number"] == 2


def test_slurm_refused_forgotten_and_unreachable_jobs(tmp_path, capsys, programs):
    programs("srun"), programs("sbatch", "echo 'sbatch: error: invalid partition specified: a100' >&2; exit 1")
    assert submit(tmp_path, "--to=slurm", "--partition=a100") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message == "error: sbatch refused the job: sbatch: error: invalid partition specified: a100"
    assert not (tmp_path / "job.json").exists()

    programs("sbatch", "echo Submitted batch job 7")
    assert submit(tmp_path, "--to=slurm") == 0
    programs("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    programs("sacct", "echo 'COMPLETED|0:0'")
    capsys.readouterr()
    assert main(["status", f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out == "slurm job 7: completed, exit code 0\n"
    programs("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert main(["status", f"--workdir={tmp_path}"]) == 0
    assert "no longer known to Slurm" in capsys.readouterr().out
    programs("scontrol", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert submit(tmp_path, "--to=slurm") == 2  # the job may be alive
    assert "Unable to contact" in error(capsys)


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, None, False), (2, None, False), (75, None, True), (137, 2, True), (75, 3, False)],
)
def test_sbatch_script_requeues_jobs_that_are_not_done(
    tmp_path, capsys, programs, monkeypatch, code, restarts, requeued
):
    script = tmp_path / "script.sh"
    script.write_text(dry(capsys, tmp_path / "a", "--to=slurm", "--max_restarts=3"))
    programs("srun", f"exit {code}")
    folder = programs("scontrol")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    assert subprocess.run(["bash", script]).returncode == code
    assert calls(folder, "scontrol") == (["requeue 7"] if requeued else [])


# ---------------------------------------------------------------------------------------------------- GKE


def test_gke_submits_what_the_dry_run_prints(tmp_path, capsys, programs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "simclr.py")
    folder = programs("kubectl", f"cat > {tmp_path}/stdin")
    shown = dry(capsys, "runs/a", *GKE, config=config)
    assert submit("runs/a", *GKE, config=config) == 0
    assert (tmp_path / "stdin").read_text() == shown.partition("\n")[2][:-1]  # without the newline of `print`
    assert calls(folder, "kubectl") == [shown.partition("\n")[0].removeprefix("# kubectl ")]
    assert json.loads(pathlib.Path("runs/a/job.json").read_text())["id"] == "a-1"

    def shows(status):
        programs("kubectl", f"cat <<'END'\n{json.dumps({'status': status}) if status is not None else ''}\nEND")
        capsys.readouterr()
        assert main(["status", "--workdir=runs/a"]) == 0
        return capsys.readouterr().out.strip()

    row = {"name": "slice", "ready": 1, "failed": 0}
    assert (
        shows({"restarts": 1, "replicatedJobsStatus": [row]})
        == "gke job a-1: alive, 1 slices ready, 0 failed, restarted 1 times"
    )
    assert submit("runs/a", *GKE, config=config) == 2
    assert "gke job a-1" in error(capsys)
    assert (
        main(["cancel", "--workdir=runs/a"]) == 0 and main(["logs", "--workdir=runs/a", "--lines=5", "--follow"]) == 0
    )
    delete, logs = calls(folder, "kubectl")[-2:]
    assert delete == "delete jobset a-1 --namespace=default --wait=false"
    assert logs.startswith("logs --selector=jobset.sigs.k8s.io/jobset-name=a-1,") and logs.endswith("--tail=5 --follow")
    assert shows({"terminalState": "Completed"}) == "gke job a-1: completed, restarted 0 times"
    assert shows(None) == "gke job a-1: no longer there"
    assert "name: a-2\n" in dry(capsys, "runs/a", *GKE, config=config)  # a JobSet that has ended may still exist

    programs(
        "kubectl",
        "[ $1 = get ] || { echo 'Error from server (AlreadyExists): jobsets \"a-2\" already exists' >&2; exit 1; }",
    )
    assert submit("runs/a", *GKE, config=config) == 2
    assert "already exists" in error(capsys)
    assert json.loads(pathlib.Path("runs/a/job.json").read_text())["id"] == "a-1"


# ---------------------------------------------------------------------------------------------------- a Cloud TPU


GCLOUD = """
if [ $4 = list ]; then echo READY; exit; fi
for argument; do last=$argument; done
if [ $4 = ssh ]; then cd {home} && bash -c "${{last#--command=}}"; fi
"""


def test_tpu_vm_submits_what_the_dry_run_prints(tmp_path, capsys, programs):
    folder = programs("gcloud")
    shown = dry(capsys, tmp_path / "a", *TPU, "--topology=v6e:4x4")
    subprocess.run(["bash", "-c", shown], check=True)
    expected = calls(folder, "gcloud")
    assert submit(tmp_path / "a", *TPU, "--topology=v6e:4x4") == 0
    assert len(expected) > 4 and calls(folder, "gcloud") == 2 * expected


@pytest.fixture
def host(tmp_path, programs):
    """A function that sets up a TPU host whose python runs the given text."""
    home = tmp_path / "home"
    home.mkdir()
    folder = programs("gcloud", GCLOUD.format(home=home))

    def run(text):
        (home / "train.py").write_text(text)
        python = programs("host_python") / "host_python"
        python.write_text(f'#!/bin/bash\n[ $1 = --version ] || exec {sys.executable} {home}/train.py "$@"\n')
        return (f"--setup=mkdir -p venv/bin && ln -sf {python} venv/bin/python",), folder

    return run


# A curl that writes an installer of a uv, which creates a virtual environment in the directory of the code.
UV = """
while [ $# -gt 1 ]; do [ $1 = --output ] && out=$2; shift; done
cat > $out <<'INSTALLER'
[ -z "$UV_UNMANAGED_INSTALL" ] && exit 1
mkdir -p $UV_UNMANAGED_INSTALL && cat > $UV_UNMANAGED_INSTALL/uv <<'END'
#!/bin/bash
echo "$*" >> uv.calls
for last; do true; done
if [ $1 = venv ]; then mkdir -p $last/bin && ln -s {python} $last/bin/python; fi
{fault}
END
chmod +x $UV_UNMANAGED_INSTALL/uv
INSTALLER
"""


@pytest.mark.parametrize("fault", ["", "if [ $1 = pip ]; then echo 'error: no solution' >&2; exit 1; fi"])
def test_tpu_vm_installs_python_by_uv(tmp_path, capsys, host, programs, fault):
    """The python3 of some hosts is 3.10."""
    (setup,), folder = host("print('trained')")
    python = setup.split()[-2]
    programs("python3", "exit 1"), programs("curl", UV.format(python=python, fault=fault))
    flags = ("--topology=v4:2x2x1",) if fault else ()
    assert submit(tmp_path / "a", *TPU, *flags) == (2 if fault else 0)
    there = tmp_path / "home" / "ssl_jax_job"
    created, installed = (there / "uv.calls").read_text().splitlines()
    assert created == "venv --quiet --allow-existing --python 3.12 venv"
    assert installed == "pip install --quiet --python venv/bin/python --requirement requirements.txt jax[tpu]"
    assert not calls(folder, "python3")
    if fault:  # the created TPU costs, so the message names it
        message = error(capsys)
        assert "error: no solution; the TPU has been created and costs" in message
        assert "`gcloud compute tpus tpu-vm delete pod --zone=us-west4-a`" in message
        assert not (tmp_path / "a" / "job.json").exists()
    else:
        assert "finished" in wait(tmp_path / "a", capsys, "finished", "failed", "stopped")
        assert (there / "train.log").read_text() == "trained\n"


def test_tpu_vm_setup_without_python_is_one_line(tmp_path, capsys, host):
    host("print('trained')")
    assert submit(tmp_path / "a", *TPU, "--setup=true") == 2
    assert "venv/bin/python: No such file or directory" in (message := error(capsys)) and "costs" not in message


def test_tpu_vm_job_runs_and_is_canceled(tmp_path, capsys, host):
    flags, _ = host(
        "import os, pathlib, signal, sys, time\n"
        "def save(*_): pathlib.Path('saved').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('begun', os.environ['SSL_JAX_TPU_VM'], *sys.argv[1:], flush=True)\ntime.sleep(60)"
    )
    assert submit(tmp_path / "a", *TPU, *flags) == 0
    there, deadline = tmp_path / "home" / "ssl_jax_job", time.monotonic() + 30
    while "begun" not in (there / "train.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "begun 1 launch.py train --config=configs/simclr.py:smoke" in (there / "train.log").read_text()
    assert "running" in wait(tmp_path / "a", capsys, "running", "stopped")
    assert submit(tmp_path / "a", *TPU, *flags) == 2
    assert "tpu-vm job pod" in error(capsys)
    assert main(["cancel", f"--workdir={tmp_path / 'a'}"]) == 0
    assert "stopped" in wait(tmp_path / "a", capsys, "stopped", "failed", "finished")
    assert (there / "saved").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("codes", "message"),
    [("[1, 0]", "finished"), ("[2, 0]", "failed with exit code 2"), ("[1, 1]", "failed with exit code 1")],
)
def test_tpu_vm_restarts_failed_jobs(tmp_path, capsys, host, codes, message):
    flags, _ = host(
        "import pathlib, sys\npath = pathlib.Path('count')\ncount = int(path.read_text()) if path.exists() else 0\n"
        f"path.write_text(str(count + 1))\nsys.exit({codes}[count])"
    )
    assert submit(tmp_path / "a", *TPU, *flags, "--max_restarts=1") == 0
    assert message in wait(tmp_path / "a", capsys, "finished", "failed", "stopped")


# ---------------------------------------------------------------------------------------------------- recording


SLURM = ("--to=slurm", "--partition=a100")
ENGINES = {"slurm": SLURM, "gke": GKE, "tpu-vm": TPU, "local": ("--to=local",)}


def mount(name, folder):
    return [f"--mount={folder}"] if name == "gke" else []


@pytest.fixture
def engines(programs, monkeypatch):
    """Programs of all engines; the folder of their calls."""
    for name in ("srun", "kubectl", "gcloud", "scancel"):
        programs(name)
    started = []
    shell = types.SimpleNamespace(pid=2**22 + 1)
    fake = types.SimpleNamespace(Popen=lambda *_, **__: started.append(1) or shell, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(detached, "subprocess", fake)
    monkeypatch.setattr(detached, "cancel", lambda *_: started.append("canceled"))
    return programs("sbatch", "echo Submitted batch job 7"), started


@pytest.mark.parametrize("name", ENGINES)
def test_nothing_is_submitted_where_it_cannot_be_recorded(name, tmp_path, capsys, engines, monkeypatch):
    folder, started = engines
    (tmp_path / "run").mkdir()

    def write(path, _):
        raise not_written(path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(files, "write", write)
    assert submit(tmp_path / "run", *ENGINES[name], *mount(name, tmp_path)) == 74
    assert "job.pending.json cannot be written (No space left on device)" in error(capsys)
    assert not started and all(not calls(folder, program) for program in ("sbatch", "kubectl", "gcloud"))


@pytest.mark.parametrize("name", ENGINES)
def test_job_that_can_no_longer_be_recorded_is_canceled(name, tmp_path, capsys, engines, monkeypatch):
    folder, started = engines
    put, run = files.put, tmp_path / "run"

    def full(temporary, path):
        if path.name == "job.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        put(temporary, path)

    monkeypatch.setattr(files, "put", full)
    assert submit(run, *ENGINES[name], *mount(name, tmp_path)) == 74
    assert "was started and is canceled again, since" in error(capsys)
    canceled = {"slurm": ("scancel", "7"), "gke": ("kubectl", "delete jobset run-1"), "tpu-vm": ("gcloud", "kill -TERM")}
    if name in canceled:
        program, words = canceled[name]
        assert words in calls(folder, program)[-1]
    else:
        assert started == [1, "canceled"]
    assert not (run / "job.json").exists() and not (run / "job.pending.json").exists()


def test_submission_that_was_interrupted_is_named(tmp_path, capsys, engines, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(detached, "submit", interrupted)
        assert submit(tmp_path, "--to=local") == 130
    capsys.readouterr()
    for arguments in (("status",), ("submit", "--to=local", "--config=configs/simclr.py:smoke")):
        assert main([arguments[0], f"--workdir={tmp_path}", *arguments[1:]]) == 2
        assert "did not come to its end" in error(capsys)
    (tmp_path / "job.pending.json").unlink()
    assert submit(tmp_path, "--to=local") == 0
    assert json.loads((tmp_path / "job.json").read_text())["engine"] == "local"
