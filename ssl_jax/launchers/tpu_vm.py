"""`submit --to=tpu-vm`: a Cloud TPU by gcloud: made if --topology is told, given the code, and started on every host.

On each host a shell starts the training again when it fails, as `train --max_restarts` does on one machine: when one process is lost
JAX ends the others, and all meet again. The TPU itself stays, and costs, until you delete it. A slice of several hosts needs a
--workdir that all of them share. The code is sent from the current directory, which has to be that of this repository.
"""

from __future__ import annotations

import shlex
from pathlib import Path, PurePosixPath

from ssl_jax.errors import UserError
from ssl_jax.experiment.launch_environment import TPU_VM
from ssl_jax.launchers import jobs, tpu_slices

SENT = ("launch.py", "ssl_jax", "configs", "requirements.txt")
THERE = (
    "ssl_jax_job"  # in the home of the TPU's hosts: the code, train.log, train.pid, and train.code once it has ended
)
PYTHON = "venv/bin/python"  # there
# The hosts of some kinds have Python 3.10, so uv brings one. Without a pipe, in which a failure of curl would be none.
SETUP = (
    "curl -LsSf --output uv.sh https://astral.sh/uv/install.sh && UV_UNMANAGED_INSTALL=$PWD/uv sh uv.sh && "
    "uv/uv venv --quiet --allow-existing --python 3.12 venv && "
    'uv/uv pip install --quiet --python venv/bin/python --requirement requirements.txt "jax[tpu]"'
)
# Arguments: how often, and the command. 2 is bad input, which starting again does not mend.
LOOP = """code=1
for attempt in $(seq 0 "$0"); do
  "$@"; code=$?
  if [ $code -eq 0 ] || [ $code -eq 2 ]; then break; fi
  sleep 5
done
echo $code > train.code"""
# The process itself, which has no session in its first moment; and all of its session, as the shell may end before the training has
# saved.
ALIVE = "{ kill -0 $(cat train.pid) || kill -0 -- -$(cat train.pid); } 2> /dev/null"


def add_arguments(group) -> None:
    group.add_argument("--vm", required=True, help="name of the TPU")
    group.add_argument("--zone", required=True, help="such as us-west4-a")
    group.add_argument("--topology", help=f"make the TPU first: {tpu_slices.EXAMPLES}")
    group.add_argument("--spot", action="store_true", help="with --topology, one that may be taken away")
    group.add_argument(
        "--setup",
        default=SETUP,
        help="shell line on every host before the training, in the directory of the code, where "
        f"{PYTHON} has to be afterward, 3.11 or later (default: {SETUP})",
    )


def commands(order: jobs.JobRequest) -> list[list[str]]:
    """What is run, in this order.

    Raises:
        UserError: --spot without --topology, an unknown topology, or a config that is not sent along.
    """
    options = order.options
    if options.spot and not options.topology:
        raise UserError("--spot is for a TPU that is made: say --topology, too")
    config = PurePosixPath(order.config.partition(":")[0])
    if config.is_absolute() or config.parts[0] != "configs" or ".." in config.parts:
        raise UserError(
            f"--config={order.config} is not sent to the TPU; give one below configs/, from the directory of the repository"
        )
    made, zone = [], f"--zone={options.zone}"
    if options.topology:
        slice_ = tpu_slices.parse(options.topology)
        spot = ["--spot"] if options.spot else []
        made = [[*_gcloud("create"), options.vm, zone, *slice_.flags(), f"--version={slice_.kind.runtime}", *spot]]
    training = shlex.join([PYTHON, "launch.py", *order.arguments()])
    loop = f"env {TPU_VM}=1 setsid bash -c {shlex.quote(LOOP)} {order.max_restarts} {training}"
    start = f"nohup {loop} >> train.log 2>&1 < /dev/null & echo $! > train.pid"
    return [
        *made,
        _ssh(options, "all", f"mkdir -p {THERE}"),
        [*_gcloud("scp"), "--recurse", *SENT, f"{options.vm}:{THERE}/", zone, "--worker=all"],
        _ssh(options, "all", f"cd {THERE} && rm -f train.code && {{ {options.setup}; }} && {PYTHON} --version && {{ {start}; }}"),
    ]


def describe(order: jobs.JobRequest) -> str:
    return "\n".join(shlex.join(command) for command in commands(order))


def submit(order: jobs.JobRequest) -> dict:
    """Raises UserError also where a TPU has been made and the rest fails, since it then stands idle."""
    jobs.need("gcloud", "--to=tpu-vm sends with it")
    if not all(Path(path).exists() for path in SENT):
        raise UserError(f"{', '.join(SENT)} are not all here; submit to a TPU from the directory of this repository")
    made = False
    for command in commands(order):
        try:
            jobs.call(command)
        except UserError as error:
            if not made:
                raise
            delete = shlex.join([*_gcloud("delete"), order.options.vm, f"--zone={order.options.zone}"])
            raise UserError(f"{error}; the TPU has been made and costs: submit without --topology, or `{delete}`") from None
        made = made or command[4] == "create"
    return {"id": order.options.vm, "zone": order.options.zone}


def state(job: dict, workdir: Path) -> jobs.JobState:
    """Of the TPU, and of the training on its first host."""
    jobs.need("gcloud", f"the job of --workdir={workdir} is on a Cloud TPU")
    listed = [*_gcloud("list"), f"--zone={job['zone']}", f"--filter=name~/{job['id']}$", "--format=value(state)"]
    vm = jobs.call(listed).strip()
    if vm != "READY":
        return jobs.JobState(False, f"not running: the TPU is {vm.lower() or 'gone'}")
    asked = f"cd {THERE} && if {ALIVE}; then echo running; else cat train.code || echo none; fi"
    told = jobs.call(_ssh(_Where(job), "0", asked)).strip()
    named = {"running": "running", "0": "finished", "none": "stopped"}
    return jobs.JobState(told == "running", named.get(told, f"failed with exit code {told}; see `launch.py logs`"))


def cancel(job: dict, workdir: Path) -> None:
    jobs.call(_ssh(_Where(job), "all", f"cd {THERE} && kill -TERM -- -$(cat train.pid)"))


def logs(job: dict, workdir: Path, lines: int, follow: bool) -> None:
    jobs.need("gcloud", f"the job of --workdir={workdir} is on a Cloud TPU")
    jobs.show(_ssh(_Where(job), "0", f"tail -n {lines} {'-F ' if follow else ''}{THERE}/train.log"))


class _Where:
    """A job as the options that it was submitted with."""

    def __init__(self, job: dict):
        self.vm, self.zone = job["id"], job["zone"]


def _gcloud(verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb]


def _ssh(options, worker: str, command: str) -> list[str]:
    return [*_gcloud("ssh"), options.vm, f"--zone={options.zone}", f"--worker={worker}", f"--command={command}"]
