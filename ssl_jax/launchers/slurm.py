"""`submit --to=slurm`: an sbatch script by submitit, one task for each process, which JAX joins.

How it goes on: before the end of its time the tasks get SIGTERM, save and end with 75, and the script puts the job back into the
queue, as it does when a process is lost. On preemption, `scontrol requeue` and the failure of a node Slurm does that itself
(--requeue); its SIGTERM leaves the tasks KillWait (or GraceTime) seconds to save. `scancel` also sends SIGTERM first, and is final.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ssl_jax.errors import UserError
from ssl_jax.launchers import jobs
from ssl_jax.launchers.supervise import LAUNCHER

PASSES_ON = True  # what is not understood is an option of sbatch
OURS = {"array", "error", "job-name", "open-mode", "output", "ntasks", "nodes"}
WARNING = 120  # seconds before the end of the time at which the tasks are told
ENDED = (
    "BOOT_FAIL",
    "CANCELED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
# Behind srun. 2 is bad input, which starting again does not mend.
TEARDOWN = """code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code\""""


def add_arguments(group) -> None:
    group.add_argument("--nodes", type=int, default=1, help="default: 1")
    group.add_argument("--processes_per_node", type=int, default=1, help="default: 1; on GPUs one for each, unless there is one in all")
    group.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="of shell, before the training; may be repeated"
    )
    group.description = "and any option of sbatch: --partition=a100, --time=24:00:00, --gres=gpu:8, --exclusive, ..."


def describe(order: jobs.JobRequest) -> str:
    executor = _executor(order)
    script = executor._make_submission_file_text(executor._submitit_command_str, "")  # what submitit itself writes
    task = "\n".join(f"#   {argument!r}" for argument in _task(order))
    return f"{script}\n# The function that submitit loads in each task replaces it by (os.execv)\n{task}"


def submit(order: jobs.JobRequest) -> dict:
    submitit = _submitit()
    jobs.need("sbatch", "--to=slurm is for a machine that submits to Slurm")
    try:
        job = _executor(order).submit(os.execv, sys.executable, _task(order))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"sbatch refused the job: {str(error).strip().splitlines()[-1]}") from None
    return {"id": job.job_id}


def state(job: dict, workdir: Path) -> jobs.JobState:
    """Of `scontrol`, and of `sacct` when Slurm's controller has forgotten the job.

    Raises:
        UserError: neither can be asked.
    """
    jobs.need("scontrol", f"the job of --workdir={workdir} is one of Slurm")
    try:
        shown = jobs.call(["scontrol", "show", "job", "--oneliner", job["id"]])
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return _remembered(job)
    told = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    name, reason = told["JobState"], told.get("Reason", "None")
    parts = [name.lower(), *([reason] if reason != "None" else [])]
    if told.get("Restarts", "0") != "0":
        parts.append(f"started again {told['Restarts']} times")
    if name in ENDED:
        parts.append(f"exit code {told['ExitCode'].partition(':')[0]}")
    return jobs.JobState(name not in ENDED, ", ".join(parts))


def cancel(job: dict, workdir: Path) -> None:
    jobs.call(["scancel", job["id"]])


def logs(job: dict, workdir: Path, lines: int, follow: bool) -> None:
    jobs.tail(_folder(workdir) / f"{job['id']}_0_log.out", lines, follow, lambda: state(job, workdir).alive)


def _submitit():
    # Else importing it configures logging anew, which closes every handler there is: absl's with the stream that it writes to.
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    import submitit

    return submitit


def _executor(order: jobs.JobRequest):
    """Raises UserError for impossible numbers, and options that are not of the form --KEY=VALUE or not for the user."""
    submitit = _submitit()
    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls):
            return 2  # a dry run wants no srun; `submit` looks for sbatch itself

    options = order.options
    if options.nodes < 1 or options.processes_per_node < 1:
        raise UserError(
            f"--nodes={options.nodes} and --processes_per_node={options.processes_per_node} must be at least 1"
        )
    told = _options(order.rest)
    _check_gpus(told, options.nodes, options.processes_per_node)
    # srun no longer takes it from sbatch (Slurm 22.05).
    per_task = [f"--cpus-per-task={told['cpus-per-task']}"] if "cpus-per-task" in told else []
    executor = Executor(_folder(order.workdir))
    executor.update_parameters(
        job_name=jobs.slug(order.workdir),
        nodes=options.nodes,
        ntasks_per_node=options.processes_per_node,
        time=None,  # that of the partition, if not told
        wckey=None,
        stderr_to_stdout=True,
        srun_args=per_task,
        setup=list(options.setup) or None,
        teardown=TEARDOWN.format(max_restarts=order.max_restarts).splitlines(),
        additional_parameters={"requeue": True, "signal": f"TERM@{WARNING}", **told},
    )
    return executor


def _options(rest) -> dict:
    """{'partition': 'a100', 'exclusive': True} of ['--partition=a100', '--exclusive']."""
    told = {}
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if not argument.startswith("--") or not name:
            raise UserError(f"argument {argument!r} is not understood; options of sbatch look like --partition=a100")
        if name in OURS or name.startswith("ntasks"):
            raise UserError(f"--{name} is set by submit; see --nodes, --processes_per_node and --workdir")
        told[name] = value if equals else True
    return told


def _check_gpus(told: dict, nodes: int, processes: int) -> None:
    """Raises UserError where the processes of a node would not have a GPU each. A process of its own takes all that it sees; of several
    JAX gives each the one of its number on the node, whatever else is there, and so it has to see them all.
    """
    if nodes * processes == 1:
        return
    if "gpus-per-task" in told:
        raise UserError(
            f"--gpus-per-task={told['gpus-per-task']} hides the other GPUs of a node from each process, and JAX counts them all; say "
            f"--gpus-per-node={processes}"
        )
    gpus = _gpus(told, nodes)
    if gpus and gpus != processes:
        raise UserError(
            f"--processes_per_node={processes} on nodes with {gpus:g} GPUs each: of several processes JAX gives each one GPU; say "
            f"--processes_per_node={max(1, int(gpus))}, or ask for as many GPUs as processes"
        )


def _gpus(told: dict, nodes: int) -> float:
    """How many options of sbatch ask for on each node: --gres=gpu:a100:8, --gpus-per-node=8, --gpus=16; 0 where none does."""

    def count(items) -> int:
        last = [item.rpartition(":")[2] for item in items]
        return sum(int(n) if n.isdigit() else 1 for n in last)  # gpu and gpu:a100 are one

    wanted = {name: str(told.get(name, "")).split(",") for name in ("gres", "gpus-per-node", "gpus")}
    gres = [item for item in wanted["gres"] if item.removeprefix("gres/").partition(":")[0] == "gpu"]
    return count(gres) or count(filter(None, wanted["gpus-per-node"])) or count(filter(None, wanted["gpus"])) / nodes


def _task(order: jobs.JobRequest) -> list[str]:
    return [sys.executable, str(LAUNCHER), *order.arguments()]


def _folder(workdir: Path) -> Path:
    return workdir.absolute() / "slurm"


def _remembered(job: dict) -> jobs.JobState:
    shown = ""
    if shutil.which("sacct") is not None:
        try:
            shown = jobs.call(
                ["sacct", "--jobs", job["id"], "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode"]
            )
        except UserError as error:
            if "accounting storage is disabled" not in str(error):
                raise
    name, _, code = shown.strip().partition("|")
    return jobs.JobState(
        False, f"{name.lower()}, exit code {code.partition(':')[0]}" if name else "no longer known to Slurm"
    )
