"""`submit --to=tpu-vm`: a Cloud TPU by gcloud, which creates it with --topology, copies the code, and starts every host.

On each host a shell restarts the training when it fails, as `train --max_restarts` does on one machine. When one process is lost,
JAX ends the others, and all join again. The TPU itself stays, and costs, until you delete it. A slice of several hosts needs a
--workdir that all of them share. The code is copied from the current directory, which has to be that of this repository.
"""

from __future__ import annotations

import shlex
from pathlib import Path, PurePosixPath

from ssl_jax.errors import UserError
from ssl_jax.experiment.launch_environment import TPU_VM
from ssl_jax.launchers import jobs, tpu_slices

CODE = ("launch.py", "ssl_jax", "configs", "requirements.txt")
FOLDER = "ssl_jax_job"  # in the home directory of each host: the code, train.log, train.pid, and train.code after the end
FIELDS = {"id": jobs.NAME, "zone": jobs.NAME}
PYTHON = "venv/bin/python"  # in FOLDER
# Some hosts have Python 3.10, so uv installs another. No pipe into sh: it would hide a failure of curl.
SETUP = (
    "curl -LsSf --output uv.sh https://astral.sh/uv/install.sh && UV_UNMANAGED_INSTALL=$PWD/uv sh uv.sh && "
    "uv/uv venv --quiet --allow-existing --python 3.12 venv && "
    'uv/uv pip install --quiet --python venv/bin/python --requirement requirements.txt "jax[tpu]"'
)
# Arguments: the number of restarts, and the command. Exit code 2 is bad input, which a restart does not repair.
LOOP = """code=1
for attempt in $(seq 0 "$0"); do
  "$@"; code=$?
  if [ $code -eq 0 ] || [ $code -eq 2 ]; then break; fi
  sleep 5
done
echo $code > train.code"""
# The process, before it has its session, or any process of its session, since the shell may end before the training has saved.
ALIVE = "{ kill -0 $(cat train.pid) || kill -0 -- -$(cat train.pid); } 2> /dev/null"


def add_arguments(group) -> None:
    group.add_argument("--vm", required=True, help="name of the TPU")
    group.add_argument("--zone", required=True, help="such as us-west4-a")
    group.add_argument("--topology", help=f"create the TPU first: {tpu_slices.EXAMPLES}")
    group.add_argument("--spot", action="store_true", help="with --topology, a preemptible TPU")
    group.add_argument(
        "--setup",
        default=SETUP,
        help="shell line on every host before the training, in the directory of the code; it installs "
        f"{PYTHON}, 3.11 or later (default: {SETUP})",
    )


def commands(request: jobs.JobRequest) -> list[list[str]]:
    """What is run, in this request.

    Raises:
        UserError: --spot without --topology, an unknown topology, or a config outside of configs/.
    """
    options = request.options
    jobs.check_name("--vm", options.vm)
    jobs.check_name("--zone", options.zone)
    if options.spot and not options.topology:
        raise UserError("--spot is for a TPU that is created; give --topology, too")
    config = PurePosixPath(request.config.partition(":")[0])
    if config.is_absolute() or config.parts[0] != "configs" or ".." in config.parts:
        raise UserError(
            f"--config={request.config} is not copied to the TPU; give one below configs/, from the directory of the repository"
        )
    create, zone = [], f"--zone={options.zone}"
    if options.topology:
        slice_ = tpu_slices.parse(options.topology)
        spot = ["--spot"] if options.spot else []
        create = [[*_gcloud("create"), options.vm, zone, *slice_.flags(), f"--version={slice_.kind.runtime}", *spot]]
    training = shlex.join([PYTHON, "launch.py", *request.arguments()])
    loop = f"env {TPU_VM}=1 setsid bash -c {shlex.quote(LOOP)} {request.max_restarts} {training}"
    start = f"nohup {loop} >> train.log 2>&1 < /dev/null & echo $! > train.pid"
    return [
        *create,
        _ssh(options, "all", f"mkdir -p {FOLDER}"),
        [*_gcloud("scp"), "--recurse", *CODE, f"{options.vm}:{FOLDER}/", zone, "--worker=all"],
        _ssh(options, "all", f"cd {FOLDER} && rm -f train.code && {{ {options.setup}; }} && {PYTHON} --version && {{ {start}; }}"),
    ]


def describe(request: jobs.JobRequest) -> str:
    return "\n".join(shlex.join(command) for command in commands(request))


def submit(request: jobs.JobRequest) -> dict:
    """Raises UserError; where the TPU has been created, the message says how to delete it, since it costs."""
    jobs.need("gcloud", "--to=tpu-vm submits by it")
    if not all(Path(path).exists() for path in CODE):
        raise UserError(f"{', '.join(CODE)} are not all here; submit to a TPU from the directory of this repository")
    created = False
    for command in commands(request):
        try:
            jobs.call(command)
        except UserError as error:
            if not created:
                raise
            delete = shlex.join([*_gcloud("delete"), request.options.vm, f"--zone={request.options.zone}"])
            raise UserError(f"{error}; the TPU has been created and costs: submit without --topology, or `{delete}`") from None
        created = created or command[4] == "create"
    return {"id": request.options.vm, "zone": request.options.zone}


def state(job: dict, workdir: Path) -> jobs.JobState:
    """The state of the TPU, and of the training on its first host."""
    jobs.need("gcloud", f"the job of --workdir={workdir} is on a Cloud TPU")
    listed = [*_gcloud("list"), f"--zone={job['zone']}", f"--filter=name~/{job['id']}$", "--format=value(state)"]
    vm = jobs.call(listed).strip()
    if vm != "READY":
        return jobs.JobState(False, f"not running: the TPU is {vm.lower() or 'gone'}")
    query = f"cd {FOLDER} && if {ALIVE}; then echo running; else cat train.code || echo none; fi"
    answer = jobs.call(_ssh(_Place(job), "0", query)).strip()
    names = {"running": "running", "0": "finished", "none": "stopped"}
    return jobs.JobState(answer == "running", names.get(answer, f"failed with exit code {answer}; see `launch.py logs`"))


def cancel(job: dict, workdir: Path) -> None:
    jobs.call(_ssh(_Place(job), "all", f"cd {FOLDER} && kill -TERM -- -$(cat train.pid)"))


def logs(job: dict, workdir: Path, lines: int, follow: bool) -> None:
    jobs.need("gcloud", f"the job of --workdir={workdir} is on a Cloud TPU")
    jobs.show(_ssh(_Place(job), "0", f"tail -n {lines} {'-F ' if follow else ''}{FOLDER}/train.log"))


class _Place:
    """The options --vm and --zone of a submitted job."""

    def __init__(self, job: dict):
        self.vm, self.zone = job["id"], job["zone"]


def _gcloud(verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb]


def _ssh(options, worker: str, command: str) -> list[str]:
    return [*_gcloud("ssh"), options.vm, f"--zone={options.zone}", f"--worker={worker}", f"--command={command}"]
