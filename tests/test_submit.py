"""launch.py submit, status, logs, cancel: dry runs, bad input, and a local job from end to end."""

import json
import os
import pathlib
import shlex
import subprocess

import jsonschema
import pytest
import yaml
from submitting import GKE, ROOT, SCHEMA, TPU, dry, error, submit, wait
from xla_flags import flags

from launch import main
from ssl_jax import processes
from ssl_jax.errors import UserError
from ssl_jax.launchers import detached, jobs, supervise, tpu_slices


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


# ---------------------------------------------------------------------------------------------------- dry runs


def test_dry_run_of_slurm_prints_the_sbatch_script(tmp_path, capsys, no_programs):
    flags = (
        "--nodes=2",
        "--processes_per_node=8",
        "--partition=a100",
        "--time=24:00:00",
        "--exclusive",
        "--cpus_per_task=4",
    )
    run = tmp_path / "My Run"
    script = dry(capsys, run, "--to=slurm", *flags, "--setup=module load cuda", "--max_restarts=3", "--config.seed=7")
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert options >= {"nodes=2", "ntasks-per-node=8", "partition=a100", "time=24:00:00", "exclusive", "cpus-per-task=4"}
    assert options >= {"requeue", "signal=TERM@120", "open-mode=append", "job-name=my-run"}
    assert not any(line.startswith("wckey") for line in options)
    lines = script.splitlines()
    srun = next(i for i, line in enumerate(lines) if line.startswith("srun "))
    assert "module load cuda" in lines[:srun] and "--cpus-per-task=4" in lines[srun]
    assert next(line for line in lines[srun + 1 :] if line and not line.startswith("#")) == "code=$?"
    assert "-lt 3 ]" in script and "'--config.seed=7'" in script and "'--saved_code=75'" in script
    assert not run.exists()


def test_slurm_without_time_has_no_time_option(tmp_path, capsys, no_programs):
    assert "--time" not in dry(capsys, tmp_path / "a", "--to=slurm")


GPUS = "--nodes=2", "--processes_per_node=8"


@pytest.mark.parametrize(
    "flags",
    [
        (*GPUS, "--gres=gpu:8"),
        (*GPUS, "--gres=nvme:1,gpu:a100:8"),
        (*GPUS, "--gpus-per-node=a100:4,h100:4"),
        (*GPUS, "--gpus=16"),
        ("--nodes=2", "--gres=gpu"),
        ("--gres=gpu:8",),  # a single process takes all GPUs
        ("--gpus-per-task=8",),
    ],
)
def test_slurm_accepts_one_gpu_per_process(tmp_path, capsys, no_programs, flags):
    assert f"#SBATCH {flags[-1]}" in dry(capsys, tmp_path / "a", "--to=slurm", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--nodes=2", "--gres=gpu:8"), "8 GPUs each, and JAX gives each of several processes one GPU; give --processes_per_node=8"),
        (("--nodes=2", "--gres=gpu:a100:8,nvme:1"), "--processes_per_node=8, or"),
        (("--processes_per_node=4", "--gpus_per_node=a100:8"), "--processes_per_node=8, or"),
        (("--nodes=2", "--gpus=16"), "--processes_per_node=8, or"),
        ((*GPUS, "--gpus=3"), "1.5 GPUs each"),
        ((*GPUS, "--gpus-per-task=1"), "--gpus-per-task=1 hides the other GPUs of a node from each process"),
    ],
)
def test_slurm_refuses_another_number_of_gpus_than_processes(tmp_path, capsys, no_programs, flags, message):
    assert submit(tmp_path / "a", "--to=slurm", *flags, "--dry_run") == 2
    assert message in error(capsys)


def test_dry_run_of_local_prints_the_command(tmp_path, capsys):
    text = dry(capsys, tmp_path / "a", "--to=local", "--processes=2", "--max_restarts=1", "--config.seed=7")
    words = shlex.split(text)
    assert words[0] == "setsid" and words[-1] == "&"
    assert {"train", "--processes=2", "--max_restarts=1", "--config.seed=7", "--saved_code=75"} <= set(words)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("engine", [("--to=slurm",), ("--to=local",), GKE, TPU])
def test_profile_is_an_argument_of_the_training(tmp_path, capsys, no_programs, engine):
    text = dry(capsys, "runs/a", *engine, "--profile=20:24")
    (line,) = (line for line in text.splitlines() if "--profile" in line)  # not an option of sbatch, which has another --profile
    assert "--profile=20:24" in line and "SBATCH" not in line


def test_dry_run_of_gke_prints_a_jobset(tmp_path, capsys, no_programs):
    text = dry(capsys, "runs/Mine", *GKE, "--slices=2", "--max_restarts=50", "--namespace=vision", "--config.seed=7")
    assert text.startswith("# kubectl create --namespace=vision --filename=-\n")
    manifest = yaml.safe_load(text)
    jsonschema.validate(manifest, SCHEMA)
    assert manifest["metadata"]["name"] == "mine-1" and manifest["metadata"]["namespace"] == "vision"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 50 and manifest["spec"]["network"]["subdomain"] == "mine-1"
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (2, 64, 64, 0)
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    assert container["command"][:4] == ["python", "launch.py", "train", "--config=configs/simclr.py:smoke"]
    assert set(container["command"][4:]) == {"--workdir=/mnt/runs/runs/Mine", "--config.seed=7", "--saved_code=75"}
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert not pathlib.Path("runs/Mine").exists()


def test_dry_run_of_tpu_vm_prints_gcloud_commands(capsys, no_programs):
    text = dry(capsys, "runs/mine", *TPU, "--topology=v4:4x4x4", "--spot", "--setup=echo ready")
    commands = [[*shlex.split(line)] for line in text.replace("\n", "\0").replace("\0gcloud", "\ngcloud").split("\n")]
    assert [command[4] for command in commands] == ["create", "ssh", "scp", "ssh"]
    assert {
        "pod",
        "--zone=us-west4-a",
        "--type=v4",
        "--topology=4x4x4",
        "--version=tpu-ubuntu2204-base",
        "--spot",
    } <= set(commands[0])
    assert {"launch.py", "ssl_jax", "configs", "requirements.txt", "pod:ssl_jax_job/", "--worker=all"} <= set(
        commands[2]
    )
    assert (
        "--worker=all" in commands[3] and "echo ready" in commands[3][-1] and "--workdir=runs/mine" in commands[3][-1]
    )
    assert len(dry(capsys, "runs/mine", *TPU).split("gcloud ")) == 1 + 3  # no create without --topology


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "flags"),
    [  # by cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and cloud.google.com/tpu/docs
        ("v4:2x2x1", 1, 4, ["--type=v4", "--topology=2x2x1"]),
        ("v4:2x2x4", 4, 4, ["--type=v4", "--topology=2x2x4"]),
        ("v5e:1x1", 1, 1, ["--accelerator-type=v5litepod-1"]),
        ("v5e:2x4", 1, 8, ["--accelerator-type=v5litepod-8"]),
        ("v5e:4x4", 4, 4, ["--accelerator-type=v5litepod-16"]),
        ("v5e:16x16", 64, 4, ["--accelerator-type=v5litepod-256"]),
        ("v5p:2x2x2", 2, 4, ["--type=v5p", "--topology=2x2x2"]),
        ("v5p:4x4x16", 64, 4, ["--type=v5p", "--topology=4x4x16"]),  # v5p-512 would be 4x8x8
        ("v5p:16x16x24", 1536, 4, ["--type=v5p", "--topology=16x16x24"]),
        ("v6e:8x8", 16, 4, ["--accelerator-type=v6e-64"]),
    ],
)
def test_hosts_chips_and_flags_of_tpu_slices(topology, hosts, chips, flags):
    found = tpu_slices.parse(topology)
    assert (found.hosts, found.chips_of_host, found.flags()) == (hosts, chips, flags)


# ---------------------------------------------------------------------------------------------------- JobSets and their schemas


def jobset(capsys, *flags):
    return yaml.safe_load(dry(capsys, "runs/a", *GKE, *flags))


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x4", "v5p:4x4x8", "v6e:4x8"])
def test_jobset_of_every_tpu_kind_is_valid(capsys, no_programs, topology):
    jsonschema.validate(jobset(capsys, f"--topology={topology}"), SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("apiVersion",), "jobset.x-k8s.io/v1alpha1"),
        (("spec", "failurePolicy", "maxRestarts"), "10"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "network", "subDomain"), "a"),
        (("spec", "replicatedJobs", 0, "name"), None),
        (("spec", "replicatedJobs", 0, "template", "spec", "template"), None),
        (("spec", "replicatedJobs", 0, "template", "spec", "completions"), 2.5),
        (
            (
                "spec",
                "replicatedJobs",
                0,
                "template",
                "spec",
                "podFailurePolicy",
                "rules",
                0,
                "onExitCodes",
                "operator",
            ),
            None,
        ),
    ],
)
def test_jobset_schema_refuses_wrong_manifests(capsys, no_programs, path, value):
    manifest = jobset(capsys)
    node = manifest
    for key in path[:-1]:
        node = node[key]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_job_of_the_jobset_is_valid_by_the_schema_of_kubernetes(capsys, no_programs):
    published = pytest.importorskip("kubernetes_validate", reason="make reference installs the schemas of Kubernetes")
    (row,) = jobset(capsys)["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **row["template"]}
    published.validate(job, "1.31", strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerport"] = 1
    with pytest.raises(published.ValidationError):
        published.validate(job, "1.31", strict=True)


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to=local", "--config.sead=1"), "unknown key config.sead; did you mean config.seed?"),
        (("--to=local", "--config.baselines=('nothing',)"), "'nothing' is unknown"),
        (("--to=local", "--nodes=2"), "argument '--nodes=2' is not understood with --to=local"),
        (("--to=local", "--processes=0"), "--processes=0 must be at least 1"),
        (("--to=local", "--processes=100000000000000000000"), "must be at least 1 and at most 1024"),
        (("--to=local", "--max_restarts=-1"), "--max_restarts=-1 must not be negative"),
        (("--to=slurm", "--profile=energy"), "--profile=energy is not a range of steps"),
        (("--to=slurm", "--nodes=0"), "--nodes=0"),
        (("--to=slurm", "--ntasks-per-node=4"), "--ntasks-per-node is set by submit"),
        (("--to=slurm", "partition=a100"), "'partition=a100' is not understood"),
        (GKE[:3], "--claim"),
        ((*GKE, "--topology=v5e:3x5"), "v5e has the shapes 1x1, 2x2"),
        ((*GKE, "--topology=v9:4x4"), "--topology=v9:4x4 is unknown"),
        ((*GKE, "--topology=v4:4x4"), "shapes of three sides"),
        ((*GKE, "--topology=v5p:4x4x5"), "v5p has shapes of three sides: 2x2x1, and ascending ones of 2 or multiples of 4"),
        ((*GKE, "--topology=v5p:8x4x4"), "ascending"),
        ((*TPU, "--topology=v5p:16x20x28"), "a slice of v5p has 6,144 chips at most, not 8,960"),
        ((*GKE, "--topology=v5e:2x4", "--slices=2"), "has one host"),
        ((*GKE, "--slices=0"), "--slices=0 must be at least 1"),
        ((*GKE, "--partition=a100"), "argument '--partition=a100' is not understood with --to=gke"),
        ((*TPU, "--spot"), "--spot is for a TPU that is created"),
        (("--to=pbs",), "invalid choice"),
    ],
)
def test_submit_with_bad_input_is_one_line_and_sends_nothing(tmp_path, capsys, programs, flags, message):
    for name in ("sbatch", "kubectl", "gcloud"):
        folder = programs(name)
    workdir = "runs/never" if "gke" in flags[0] else tmp_path / "a"
    assert submit(workdir, *flags) == 2
    assert message in error(capsys)
    assert not pathlib.Path(workdir).exists()
    assert not [path.name for path in folder.iterdir() if path.suffix == ".calls"]


def test_workdir_or_config_outside_of_what_is_mounted_or_copied_is_refused(tmp_path, capsys, no_programs):
    assert submit(tmp_path / "a", *GKE) == 2
    assert "is not below --mount=/mnt/runs" in error(capsys)
    assert submit("../a", *GKE) == 2
    assert "is not below --mount=/mnt/runs" in error(capsys)
    assert submit(tmp_path / "a", *TPU, config=str(ROOT / "configs" / "simclr.py")) == 2
    assert "is not copied to the TPU" in error(capsys)
    assert submit(tmp_path / "a", "--to=local", config="configs/nothing.py") == 2
    assert "no such file" in error(capsys)


@pytest.mark.parametrize(("flags", "program"), [(("--to=slurm",), "sbatch"), (GKE, "kubectl"), (TPU, "gcloud")])
def test_missing_sbatch_kubectl_or_gcloud_is_one_line(tmp_path, capsys, no_programs, flags, program):
    mount = (f"--mount={tmp_path}",) if program == "kubectl" else ()
    assert submit(tmp_path / "a", *flags, *mount) == 2
    assert f"{program} is not installed here" in error(capsys)
    assert not (tmp_path / "a" / "job.json").exists()


@pytest.mark.parametrize("verb", ["status", "cancel", "logs"])
def test_status_cancel_and_logs_without_a_job_are_one_line(tmp_path, capsys, verb):
    assert main([verb, f"--workdir={tmp_path}"]) == 2
    assert "nothing was submitted from it" in error(capsys)
    assert main([verb, f"--workdir={tmp_path}", "--config.seed=1"]) == 2
    assert "'--config.seed=1' is not understood" in error(capsys)


# ---------------------------------------------------------------------------------------------------- this machine


@pytest.fixture
def local_script(tmp_path, monkeypatch):
    def put(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        monkeypatch.setattr(supervise, "LAUNCHER", path)
        return tmp_path / "a"

    return put


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (0, "finished"),
        (2, "refused as bad input"),
        (75, "stopped by SIGTERM, and saved"),
        (9, "failed with exit code 9"),
    ],
)
def test_status_of_a_local_job_by_exit_code(local_script, capsys, code, message):
    run = local_script(f"print('hello')\nraise SystemExit({code})")
    assert submit(run, "--to=local") == 0
    assert message in wait(run, capsys, "ed")
    assert main(["logs", f"--workdir={run}", "--lines=1", "--follow"]) == 0
    assert capsys.readouterr().out == "hello\n"


def test_status_of_a_killed_local_job_and_of_one_on_another_host(local_script, capsys):
    run = local_script("import time\ntime.sleep(60)")
    assert submit(run, "--to=local") == 0
    job = json.loads((run / "job.json").read_text())
    os.killpg(job["id"], 9)
    assert "gone, without an exit code" in wait(run, capsys, "gone")
    (run / "job.json").write_text(json.dumps({**job, "host": "another"}))
    assert main(["status", f"--workdir={run}"]) == 2
    assert "is a process of another; ask there" in error(capsys)


def test_later_process_with_the_same_id_is_not_the_job(tmp_path):
    job = {"id": os.getpid(), "host": os.uname().nodename, "born": "1"}
    assert not detached.state(job, tmp_path).alive
    assert not detached.state({**job, "born": processes.born(os.getpid())}, tmp_path).alive  # another command


def test_cancel_ends_only_the_process_that_was_started(local_script, tmp_path, capsys):
    """job.json may be changed by hand, or be that of another workdir."""
    run = local_script("import time\ntime.sleep(60)")
    assert submit(run, "--to=local") == 0
    job = json.loads((run / "job.json").read_text())
    victim = subprocess.Popen(["sleep", "60"], start_new_session=True)
    other = tmp_path / "other"
    other.mkdir()
    try:
        for where, changed in [(run, {"id": victim.pid, "born": processes.born(victim.pid)}), (other, {})]:
            (where / "job.json").write_text(json.dumps({**job, **changed}))
            assert main(["cancel", f"--workdir={where}"]) == 0
            assert "had ended before" in capsys.readouterr().out
            with pytest.raises(UserError, match=r"is not the job of --workdir"):
                detached.cancel({**job, **changed}, where)
        assert victim.poll() is None
        (run / "job.json").write_text(json.dumps(job))
        assert main(["cancel", f"--workdir={run}"]) == 0
        assert "stopped by SIGTERM" in wait(run, capsys, "stopped")
    finally:
        victim.kill()
        victim.wait()


SHELL = "a\ntouch /tmp/pwned"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to=slurm", f"--partition={SHELL}"), r"control character"),
        (("--to=slurm", "--a\ntouch /tmp/pwned=1"), "control character"),
        (("--to=slurm", "--a;b=1"), "is not understood"),
        (("--to=local", "--config.data.data_dir=a\x1b[2J"), "control character"),
        ((*GKE, f"--image={SHELL}"), "control character"),
        ((*GKE, "--namespace=--all"), "--namespace=--all is no name"),
        ((*TPU, "--vm=--quiet"), "--vm=--quiet is no name"),
        ((*TPU, "--zone=a;b"), "--zone=a;b is no name"),
        ((*TPU, "--topology=v5e:2x4\n"), "control character"),
    ],
)
def test_no_argument_becomes_shell_or_an_option(capsys, programs, flags, message):
    folder = programs("sbatch")
    assert submit("runs/never", *flags) == 2
    assert message in error(capsys)
    assert not pathlib.Path("runs/never").exists() and not [path for path in folder.iterdir() if path.suffix == ".calls"]


@pytest.mark.parametrize("flags", [("--to=slurm",), ("--to=local",), GKE, TPU])
def test_a_workdir_with_control_characters_is_refused(capsys, no_programs, flags):
    assert submit(f"runs/{SHELL}", *flags) == 2
    assert "control character" in error(capsys)


@pytest.mark.parametrize("flags", [("--to=slurm",), ("--to=local",), TPU])
def test_metacharacters_in_names_are_quoted(tmp_path, capsys, no_programs, flags):
    """The text is run as it would be, with programs that do nothing in place of those that it calls."""
    name = "$(touch pwned) `touch pwned`; touch pwned; 'a"
    more = (f"--comment={name}",) if "slurm" in flags[0] else ()
    sent = dry(capsys, tmp_path / name, *flags, *more, f"--config.data.data_dir={name}")
    remote = "gcloud() { eval \"$(printf '%s' \"${@: -1}\" | sed -n 's/^--command=/: /p')\"; }"  # as ssh does on the other side
    quiet = f"setsid() {{ :; }}; srun() {{ :; }}; scontrol() {{ :; }}; {remote}\n"
    done = subprocess.run(["/bin/bash", "-c", quiet + sent], capture_output=True, text=True, cwd=tmp_path)
    assert not list(tmp_path.rglob("pwned")), done.stderr


@pytest.mark.parametrize(
    ("engine", "fields"),
    [
        ("slurm", {"id": "1; touch a"}), ("slurm", {"id": "../../etc/passwd"}), ("slurm", {"id": 7}), ("slurm", {}),
        ("gke", {"id": "--all", "namespace": "default"}), ("gke", {"id": "a"}), ("gke", {"id": "a", "namespace": None}),
        ("tpu-vm", {"id": "a$(b)", "zone": "c"}), ("tpu-vm", {"id": "a", "zone": "--d"}),
        ("local", {"id": -1}), ("local", {"id": 0, "host": "a", "born": "1"}), ("local", {"id": 1, "host": "a", "born": "1"}),
        ("local", {"id": "7", "host": "a", "born": "1"}), ("local", {"id": True, "host": "a", "born": "1"}),
        ("local", {"id": 7, "host": "a"}),
        ("pbs", {"id": "1"}), (["slurm"], {"id": "1"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["status", "cancel", "logs"])
def test_a_changed_job_json_is_refused(tmp_path, capsys, programs, verb, engine, fields):
    folders = [programs(name) for name in ("scontrol", "scancel", "kubectl", "gcloud")]
    (tmp_path / "job.json").write_text(json.dumps({"engine": engine, "number": 1, **fields}))
    assert main([verb, f"--workdir={tmp_path}"]) == 2
    assert "job.json is damaged" in error(capsys)
    assert not [path for path in folders[0].iterdir() if path.suffix == ".calls"]


def test_logs_show_control_characters_as_escapes(tmp_path, capsys):
    (tmp_path / "log").write_text("a\x1b]0;title\x07\tb\u202e\n")
    jobs.tail(tmp_path / "log", 1, False, lambda: False)
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07\tb\\u202e\n"


def test_logs_follow_until_the_job_ends(tmp_path, capsys):
    path, calls = tmp_path / "log", []
    path.write_text("1\n2\n3\n")

    def alive():
        calls.append(1)
        with path.open("a") as file:
            file.write(f"more {len(calls)}\n")
        return len(calls) < 2

    jobs.tail(path, 2, True, alive)
    assert capsys.readouterr().out == "2\n3\nmore 1\nmore 2\n"


@pytest.mark.full
def test_local_job_canceled_and_submitted_again_resumes(tmp_path, capsys, monkeypatch):
    """The training saves when it is canceled, and resumes from there."""
    monkeypatch.setenv("XLA_FLAGS", flags(1))
    run, steps = tmp_path / "run", 400
    every = [f"--config.{key}={steps} steps" for key in ("total", "evaluate_every", "checkpoint_every")]
    overrides = ["--config.baselines=()", *every]
    assert submit(run, "--to=local", *overrides, config="configs/autoencoder.py:smoke") == 0
    assert "running; step" in wait(run, capsys, "step", "failed", "refused", seconds=600)
    assert submit(run, "--to=local", *overrides, config="configs/autoencoder.py:smoke") == 2
    assert "is running; wait for it" in error(capsys)
    assert main(["cancel", f"--workdir={run}"]) == 0
    status = wait(run, capsys, "stopped", "failed", "finished", seconds=120)
    assert "stopped by SIGTERM, and saved" in status
    saved = int(status.split("step ")[1].split()[0])
    assert 0 < saved < steps
    assert submit(run, "--to=local", *overrides, config="configs/autoencoder.py:smoke") == 0
    assert "finished; step 400 is the last one logged" in wait(
        run, capsys, "finished", "failed", "stopped", seconds=600
    )
    assert main(["logs", f"--workdir={run}", "--lines=1000"]) == 0
    assert f"going on at step {saved} of {steps}" in capsys.readouterr().out
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, steps + 1))
