"""Several processes of one run: how they start, how failures are noticed, and that they compute what one process does."""

import functools
import os
import signal
import socket
import time

import pytest
from process_runs import Runs, start_pair

from launch import main
from ssl_jax.errors import UserError
from ssl_jax.experiment import distributed, launch_environment
from ssl_jax.experiment.launch_environment import COORDINATOR, PROCESS, PROCESSES, TPU_VM
from ssl_jax.launchers import supervise


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # within sbatch, but not started by srun
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a,b"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a:8080"}, "GKE"),
        ({TPU_VM: "1"}, "Cloud TPU"),
    ],
)
def test_launcher_is_detected_from_environment_variables(environment, found):
    assert launch_environment.detect_launcher(environment) == found
    assert launch_environment.launched_process(environment) is None


def test_launched_process_reads_coordinator_count_and_index():
    variables = {COORDINATOR: "127.0.0.1:1", PROCESSES: "4", PROCESS: "2"}
    assert launch_environment.launched_process(variables) == ("127.0.0.1:1", 4, 2)


def test_tpu_hosts_need_the_environment_variable_to_join(monkeypatch):
    for name in (COORDINATOR, "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    joined = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **options: joined.append(options))
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match=r"one of 4 hosts of a TPU; start every one of them with SSL_JAX_TPU_VM=1"):
        distributed.initialize()
    monkeypatch.setenv(TPU_VM, "1")
    distributed.initialize()
    assert joined == [{"heartbeat_timeout_seconds": distributed.HEARTBEAT}]


def test_failure_to_join_other_processes_is_a_fault_of_the_machine(monkeypatch, capsys):
    def fails(**_):
        raise RuntimeError("Failed to recognize coordinator address a-0\nmore")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", fails)
    monkeypatch.setenv(TPU_VM, "1")
    assert main(["train", "--config=configs/simclr.py:smoke", "--workdir=never"]) == 74
    assert "error: the other processes (Cloud TPU) could not be joined (Failed to recognize" in capsys.readouterr().err


def test_coordinator_port_in_use_exits_with_74(monkeypatch, capsys):
    with socket.create_server(("", 0)) as taken:
        place = ((COORDINATOR, f"127.0.0.1:{taken.getsockname()[1]}"), (PROCESSES, "1"), (PROCESS, "0"))
        for name, value in place:
            monkeypatch.setenv(name, value)
        assert main(["train", "--config=configs/simclr.py:smoke", "--workdir=never"]) == 74
    assert "of the coordinator is taken (Address already in use); start again" in capsys.readouterr().err


def test_max_restarts_without_processes_supervises_one_process(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(supervise, "supervise", lambda *arguments: calls.append(arguments) or 0)
    flags = ["train", "--config=configs/simclr.py:smoke", f"--workdir={tmp_path}", "--max_restarts=3"]
    assert main(flags) == 0
    assert calls[0][1:4] == (1, tmp_path, 3)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    assert main(flags) == 2 and len(calls) == 1


@pytest.mark.parametrize("visible", [None, "4,5"])
def test_each_process_gets_one_of_the_visible_gpus(monkeypatch, visible):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name, value in ((COORDINATOR, "127.0.0.1:1"), (PROCESSES, "2"), (PROCESS, "1")):
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *places, **_: calls.append(places))
    distributed.initialize()
    monkeypatch.setenv(PROCESSES, "1")
    monkeypatch.setenv(PROCESS, "0")
    monkeypatch.setattr(distributed, "_check_port", lambda coordinator: None)
    distributed.initialize()  # a single process has all GPUs
    assert calls == [("127.0.0.1:1", 2, 1, [1], "deactivate"), ("127.0.0.1:1", 1, 0, None, "deactivate")]


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A function that runs `supervise` on a script, given as text, in place of launch.py."""

    def start(text, processes=2, max_restarts=0):
        path = tmp_path / "script.py"
        me, folder = f"int(os.environ[{PROCESS!r}])", f"pathlib.Path({str(tmp_path)!r})"
        head = f"import os, pathlib, signal, sys, time\nme, folder = {me}, {folder}"
        path.write_text(f"{head}\n{text}")
        monkeypatch.setattr(supervise, "LAUNCHER", path)
        monkeypatch.setattr(supervise, "GRACE", 1.0)
        monkeypatch.setattr(supervise, "LAST", 2.0)
        monkeypatch.setattr(supervise, "KILL", 1.0)
        return supervise.supervise([], processes, tmp_path / "run", max_restarts)

    return start


def test_all_processes_succeed(scripted, tmp_path):
    assert scripted("print('process', me)", processes=3) == 0
    assert (tmp_path / "run" / "processes" / "2.txt").read_text() == "process 2\n"


@pytest.mark.parametrize(
    ("text", "code", "cause"),
    [
        ("sys.exit(3 if me == 1 else 0)", 1, "process 1 ended with exit code 3"),
        ("sys.exit(1) if me == 1 else os.kill(os.getpid(), signal.SIGKILL)", 1, "ended with exit code 1"),
        (
            "os.kill(os.getpid(), signal.SIGKILL) if me == 1 else time.sleep(99)",
            74,
            "process 1 ended with SIGKILL, process 0 did not",
        ),
        ("os.kill(os.getpid(), signal.SIGSTOP) if me == 1 else os.abort()", 74, "process 1 did not answer and was killed"),
        ("sys.exit(0) if me == 1 else time.sleep(99)", 74, "process 0 did not answer and was killed"),
    ],
)
def test_failed_process_is_named_and_the_others_are_ended(scripted, caplog, text, code, cause):
    began = time.monotonic()
    assert scripted(text) == code
    assert time.monotonic() - began < 10
    assert cause in caplog.text and "giving up" in caplog.text


def test_all_processes_are_restarted_after_a_failure(scripted, caplog, tmp_path):
    text = "path = folder / f'{me}'\nagain = path.exists()\npath.touch()\nsys.exit(0 if again or me == 0 else 70)"
    assert scripted(text, max_restarts=1) == 0
    assert "process 1 ended with exit code 70; restarting all (1 of 1)" in caplog.text


def test_bad_input_is_not_restarted(scripted, caplog, tmp_path):
    assert scripted("(folder / f'{me}-{time.time()}').touch(); sys.exit(2)", max_restarts=5) == 2
    assert len(list(tmp_path.glob("0-*"))) == 1


def test_machine_fault_is_restarted_at_another_port(scripted, tmp_path):
    note = f"(folder / ('0-' + os.environ[{COORDINATOR!r}])).touch()\n"
    assert scripted(note + "sys.exit(74 if len(list(folder.glob('0-*'))) == 1 else 0)", 1, max_restarts=1) == 0
    assert len(list(tmp_path.glob("0-*"))) == 2
    assert scripted("sys.exit(74)") == 74


def test_sigterm_is_passed_on_to_all_processes(scripted):
    text = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nif me == 0: os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(99)"
    assert scripted(text) == 0


def test_second_signal_kills_processes_that_hang(scripted):
    twice = "\n    os.kill(os.getppid(), signal.SIGTERM); time.sleep(1); os.kill(os.getppid(), signal.SIGTERM)"
    assert scripted(f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif me == 0:{twice}\ntime.sleep(99)") == 128 + 15


def test_saved_code_is_the_exit_code_after_sigterm(scripted, monkeypatch):
    monkeypatch.setattr(supervise, "supervise", functools.partial(supervise.supervise, saved_code=75))
    text = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(99)"
    assert scripted(text, processes=1) == 75
    assert scripted("sys.exit(0)", processes=1) == 0  # a finished run
    assert scripted("sys.exit(75)") == 75  # the processes got SIGTERM from elsewhere
    assert scripted("sys.exit(75 if me else 0)") == 75  # between the last step and the end
    assert scripted("sys.exit(75 if me else 3)") == 1


def test_zero_processes_is_one_line(tmp_path, capsys):
    flags = ["train", "--config=configs/simclr.py:smoke", f"--workdir={tmp_path}"]
    assert main([*flags, "--processes=0"]) == 2
    assert "--processes=0 must be at least 1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- real processes


def wait_until(running, text):
    while text not in running.log:
        assert running.process.poll() is None, running.log
        time.sleep(0.05)


@pytest.mark.full
def test_sigterm_before_the_first_step_ends_a_single_launched_process(tmp_path):
    runs = Runs(tmp_path, "simclr")
    running = runs.start("early", 1, "--processes=1")
    wait_until(running, "data 'scenes'")  # then the run is built and its weights are initialized
    running.process.send_signal(signal.SIGTERM)
    assert "step 1/" not in running.finish(code=128 + signal.SIGTERM, timeout=120)
    assert runs.logged("early") == 0


@pytest.mark.full
def test_processes_with_different_workdirs_are_refused(tmp_path):
    runs = Runs(tmp_path, "simclr")
    for running in start_pair(runs.arguments("one"), runs.arguments("other")):
        assert "of process 1 is not that of process 0; give a directory that all hosts share" in running.finish(code=2)
    assert not any((tmp_path / "one").glob("*.json"))


FAMILIES = ["autoencoder", *(pytest.param(name, marks=pytest.mark.slow) for name in ("simclr", "biggan", "vit_vqgan"))]


@pytest.fixture(scope="module", params=FAMILIES)
def runs(request, tmp_path_factory):
    """Runs, with the run 'alone' of one process."""
    runs = Runs(tmp_path_factory.mktemp(request.param), request.param)
    runs.start("alone", 1).finish()
    return runs


@pytest.mark.full
def test_resume_with_another_number_of_processes_has_the_same_examples_and_curve(runs):
    """Two processes, one of which gets SIGTERM; then one process with all devices."""
    stop_one(runs, "stopped", 2)
    assert "going on at step" in runs.start("stopped", 1).finish()
    runs.check("stopped", "alone")


@pytest.mark.slow
def test_processes_along_the_tensor_axis_read_the_same_rows(runs):
    runs.start("tensor", 2, "--config.mesh.data=1", "--config.mesh.tensor=4").finish()
    runs.check("tensor", "alone")


@pytest.mark.slow
def test_warm_start_of_two_processes_from_a_run_of_one(runs):
    rules = "--config.warm_start.rules=(('^', ''),)"
    log = runs.start("warm", 2, f"--config.warm_start.workdir={runs.folder / 'alone'}", rules, "--config.total=3 steps").finish()
    assert "parameters and" in log and "0 stay fresh" in log


@pytest.mark.slow
def test_resume_from_four_processes_to_two_with_one_killed(runs):
    stop_one(runs, "elastic", 4)
    two = runs.start("elastic", 2, "--max_restarts=1")
    runs.wait_for("elastic", 7, two)
    os.kill(two.child(1), signal.SIGKILL)
    log = two.finish()
    assert "process 1 ended with SIGKILL" in log and "restarting all (1 of 1)" in log and "going on at step" in log
    runs.check("elastic", "alone")


@pytest.mark.slow
def test_sigterm_before_the_first_step_of_a_resumed_run_is_handled_in_that_step(runs):
    stop_one(runs, "early", 2)
    resumed = runs.start("early", 2)
    wait_until(resumed, "going on at step")
    os.kill(resumed.child(1), signal.SIGTERM)
    assert "SIGTERM at step" in resumed.finish()
    assert runs.logged("early") < runs.steps


def stop_one(runs, workdir, processes):
    running = runs.start(workdir, processes)
    runs.wait_for(workdir, 2, running)
    os.kill(running.child(processes - 1), signal.SIGTERM)
    log = running.finish()
    assert "SIGTERM at step" in log and "saved" in log


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_curve_of_several_processes_is_that_of_one(runs, processes):
    runs.start(f"{processes}", processes).finish()
    runs.check(f"{processes}", "alone")
