"""`launch.py sweep --to=slurm|gke`: an array of jobs, by dry runs and by scripts in place of sbatch and kubectl."""

import json
import subprocess
import sys

import pytest
import yaml
from submitting import ROOT, calls, error
from sweeping import CONFIG, VARY, stand_in, sweep

from launch import main
from ssl_jax.experiment import runs, sweep_folder


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def train(tmp_path, monkeypatch):
    return stand_in(tmp_path, monkeypatch)


def test_dry_run_of_slurm_is_one_array(tmp_path, train, capsys, no_programs):
    out = tmp_path / "out"
    train[0]({"=0.1/seed-1": 1})
    assert sweep(out, VARY, "--seeds=2") == 2
    capsys.readouterr()
    given = ("--to=slurm", "--partition=a100", "--gres=gpu:1", "--max_restarts=3", "--dry_run")
    assert sweep(out, VARY + ",0.9", "--seeds=2", *given) == 0
    script = capsys.readouterr().out
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert options >= {"array=0-2%3", "partition=a100", "gres=gpu:1", "requeue", "signal=TERM@120"}
    assert f"output={out}/slurm/%A_%a_0_log.out" in options
    assert 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in script and "-lt 3 ]" in script
    tasks = script.split("# job ")[1:]
    assert [f"'--only={number}'" in task for number, task in zip((2, 3, 5), tasks, strict=True)] == [True] * 3  # new ones, a failed one
    assert all(f"'--workdir={out}'" in task and "'--vary=model.temperature=0.1,0.5,0.9'" in task for task in tasks)
    assert not (out / "job.json").exists()


def test_dry_run_of_gke_is_an_indexed_job(train, capsys, no_programs):
    given = ("--to=gke", "--topology=v5e:2x4", "--image=registry/ssl_jax:1", "--claim=filestore", "--dry_run")
    assert sweep("runs/tau", VARY, "--seeds=2", *given) == 0
    text = capsys.readouterr().out
    assert text.startswith("# kubectl create --namespace=default --filename=-\n")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("batch/v1", "Job", "tau-1")
    spec = job["spec"]
    assert [spec[key] for key in ("completionMode", "completions", "parallelism", "backoffLimitPerIndex", "maxFailedIndexes")] == [
        "Indexed", 4, 4, 10, 4,
    ]  # fmt: skip
    assert spec["podFailurePolicy"]["rules"][0]["action"] == "FailIndex"
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == [
        "python", "launch.py", "sweep", CONFIG, VARY, "--seeds=0,1,", "--workdir=/mnt/runs/runs/tau", "--only=$(JOB_COMPLETION_INDEX)",
    ]  # fmt: skip
    if published := sys.modules.get("kubernetes_validate") or _schemas():
        published.validate(job, "1.31", strict=True)
    assert sweep("runs/tau", VARY, *given, "--topology=v5e:16x16") == 2
    assert "has 64 hosts, and each run of a sweep is one pod" in error(capsys)


def _schemas():
    try:
        import kubernetes_validate
    except ImportError:
        return None
    return kubernetes_validate


@pytest.mark.full
def test_a_job_of_an_array_trains_one_run_and_notes_its_end(tmp_path):
    """The workdir and the flags alone tell what to train: the pods of a Job may see no `sweep.json` yet."""

    def only(number, code):
        script = f"""
import sys
from launch import main
from ssl_jax.experiment import training
def train(config, overrides, workdir, report, profile, saved_code, start_over):
    print(config, *overrides, workdir, saved_code)
    if {code!r} == "bug": raise ValueError("a bug")
    return {code!r}
training.run_training = train
sys.exit(main(["sweep", {CONFIG!r}, {VARY!r}, "--seeds=2", "--workdir={tmp_path}", "--only={number}"]))
"""
        return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)

    done = only(3, 75)
    run = tmp_path / "simclr-smoke-model.temperature=0.5" / "seed-1"
    assert done.returncode == 75, done.stderr
    expected = f"{CONFIG.removeprefix('--config=')} --config.model.temperature=0.5 --config.seed=1 {run} 75\n"
    assert (run / "output.txt").read_text() == expected
    assert runs.progress(run).state == "interrupted" and len(sweep_folder.read(tmp_path)["runs"]) == 4
    assert only(3, "bug").returncode == 1 and runs.progress(run)[:2] == ("failed", "ValueError: a bug")
    assert only(4, 0).stderr == "error: --only=4 is none of the 4 runs; give a lower number\n"


def test_slurm_gets_an_array_whose_states_are_counted(tmp_path, train, capsys, programs):
    programs("srun"), programs("scancel")
    folder = programs("sbatch", "echo Submitted batch job 7")
    assert sweep(tmp_path / "out", VARY, "--to=slurm", "--partition=a100") == 0
    assert "slurm job 7 submitted for 2 runs" in capsys.readouterr().out
    assert "#SBATCH --array=0-1%2" in (tmp_path / "out" / "slurm" / "7_submission.sh").read_text()
    from submitit.core.utils import DelayedSubmission  # not before the engine: see slurm._submitit

    tasks = [DelayedSubmission.load(tmp_path / "out" / "slurm" / f"7_{number}_submitted.pkl") for number in range(2)]
    assert [task.args[1][-1] for task in tasks] == ["--only=0", "--only=1"] and {"sweep", CONFIG} < set(tasks[0].args[1])
    assert json.loads((tmp_path / "out" / "job.json").read_text())["command"][:2] == ["launch.py", "sweep"]

    states = "JobId=8 ArrayJobId=7 ArrayTaskId=0 JobState=RUNNING\\nJobId=7 ArrayJobId=7 ArrayTaskId=1 JobState=PENDING"
    programs("scontrol", f"printf '{states}'")
    assert main(["status", f"--workdir={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "out: 2 runs: 2 waiting", "simclr:smoke model.temperature=0.1 seed 0: waiting",
        "simclr:smoke model.temperature=0.5 seed 0: waiting", "slurm job 7: 1 pending, 1 running",
    ]  # fmt: skip
    for to in ("--to=slurm", "--to=local"):
        assert sweep(tmp_path / "out", VARY, to) == 2
        assert "slurm job 7 of --workdir=" in error(capsys)
    assert main(["cancel", f"--workdir={tmp_path / 'out'}"]) == 0 and calls(folder, "scancel") == ["7"]
    programs("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    programs("sacct", "printf 'COMPLETED|0:0\\nFAILED|2:0'")
    capsys.readouterr()
    assert main(["status", f"--workdir={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "slurm job 7: 1 completed, 1 failed"
    assert sweep(tmp_path / "out", VARY, "--to=local") == 0 and len(train[1]()) == 2
    assert sweep(tmp_path / "out", VARY, "--to=slurm") == 0
    assert "all 2 runs are done" in capsys.readouterr().out and len(calls(folder, "sbatch")) == 1


def test_gke_gets_a_job_whose_pods_are_counted(tmp_path, train, capsys, programs):
    folder = programs("kubectl", "echo created")
    given = ("--to=gke", "--topology=v5e:2x4", "--image=registry/ssl_jax:1", "--claim=filestore", f"--mount={tmp_path}")
    assert sweep(tmp_path / "out", VARY, *given) == 0
    status = {"active": 1, "succeeded": 1, "conditions": [{"type": "Suspended", "status": "False"}]}
    programs("kubectl", f"echo '{json.dumps({'status': status})}'")
    capsys.readouterr()
    assert main(["status", f"--workdir={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "gke job out-1: 1 active, 1 succeeded, 0 failed"
    assert main(["cancel", f"--workdir={tmp_path / 'out'}"]) == 0
    assert [line.split()[:3] for line in calls(folder, "kubectl")[1:]] == [
        ["get", "job", "out-1"], ["get", "job", "out-1"], ["delete", "job", "out-1"],
    ]  # fmt: skip
    status["conditions"] = [{"type": "Complete", "status": "True"}]
    programs("kubectl", f"echo '{json.dumps({'status': status})}'")
    capsys.readouterr()
    assert main(["status", f"--workdir={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("gke job out-1: complete, ")
