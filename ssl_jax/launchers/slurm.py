"""`submit --to=slurm`: an sbatch script by submitit, with one task per process, which JAX joins.

Before the time limit the tasks get SIGTERM, save and end with 75, and the script requeues the job, as it does when a process is
lost. On preemption, `scontrol requeue` and node failure Slurm requeues the job itself (--requeue); its SIGTERM leaves the tasks
KillWait (or GraceTime) seconds to save. `scancel` also sends SIGTERM first, and is final.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

from ssl_jax.errors import UserError
from ssl_jax.launchers import jobs
from ssl_jax.launchers.supervise import launch_command

PASSES_ON = True  # unknown arguments are options of sbatch
OURS = {"array", "error", "job-name", "open-mode", "output", "ntasks", "nodes"}
WARNING = 120  # seconds between SIGTERM and the time limit
JOB = "$SLURM_JOB_ID"
OF_ARRAY = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"  # the last job of an array has the id of the whole array, too
FIELDS = {"id": re.compile(r"\d+(_\d+)?")}
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
# After srun. Exit code 2 is bad input, which a restart does not repair.
TEARDOWN = """code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]; then
  scontrol requeue "{job}"
fi
exit "$code\""""


def add_arguments(group) -> None:
    group.add_argument("--nodes", type=int, default=1, help="number of nodes (default: 1)")
    group.add_argument("--processes_per_node", type=int, default=1, help="default: 1; on GPUs one per GPU, or one process in all")
    group.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="shell line before the training; may be repeated"
    )
    group.description = "and any option of sbatch: --partition=a100, --time=24:00:00, --gres=gpu:8, --exclusive, ..."


def describe(request: jobs.JobRequest) -> str:
    executor, tasks = _executor(request), _tasks(request)
    if len(tasks) > 1:
        executor.parameters["map_count"] = len(tasks)  # as map_array sets it
    script = executor._make_submission_file_text(executor._submitit_command_str, "")  # the text that submitit writes
    parts = [f"{script}\n# In each task submitit loads os.execv, which runs"]
    for number, task in enumerate(tasks):
        parts += [f"# job {number} of the array:"] if len(tasks) > 1 else []
        parts += [f"#   {argument!r}" for argument in task]
    return "\n".join(parts)


def submit(request: jobs.JobRequest) -> dict:
    submitit = _submitit()
    jobs.need("sbatch", "--to=slurm is for a machine that submits to Slurm")
    tasks = _tasks(request)
    try:
        sent = _executor(request).map_array(os.execv, [sys.executable] * len(tasks), tasks)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"sbatch refused the job: {str(error).strip().splitlines()[-1]}") from None
    return {"id": sent[0].job_id.partition("_")[0]}


def state(job: dict, workdir: Path) -> jobs.JobState:
    """The state by `scontrol`, or by `sacct` when Slurm's controller has forgotten the job.

    Raises:
        UserError: both fail.
    """
    jobs.need("scontrol", f"the job of --workdir={workdir} is a Slurm job")
    try:
        shown = jobs.call(["scontrol", "show", "job", "--oneliner", job["id"]])
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return _accounted(job)
    each = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in shown.strip().splitlines()]
    if len(each) > 1:  # an array; jobs that have not started yet share a line
        states = [fields["JobState"] for fields in each]
        return jobs.JobState(any(state not in ENDED for state in states), _counted(states))
    (fields,) = each
    name, reason = fields["JobState"], fields.get("Reason", "None")
    parts = [name.lower(), *([reason] if reason != "None" else [])]
    if fields.get("Restarts", "0") != "0":
        parts.append(f"restarted {fields['Restarts']} times")
    if name in ENDED:
        parts.append(f"exit code {fields['ExitCode'].partition(':')[0]}")
    return jobs.JobState(name not in ENDED, ", ".join(parts))


def cancel(job: dict, workdir: Path) -> None:
    jobs.call(["scancel", job["id"]])


def logs(job: dict, workdir: Path, lines: int, follow: bool) -> None:
    jobs.tail(_folder(workdir) / f"{job['id']}_0_log.out", lines, follow, lambda: state(job, workdir).alive)


def _submitit():
    # Else importing it reconfigures logging and closes all handlers, and with absl's the stream that it writes to.
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    import submitit

    return submitit


def _executor(request: jobs.JobRequest):
    """The executor of submitit for a request.

    Raises:
        UserError: numbers below 1, options that are not of the form --KEY=VALUE, or options that `submit` sets itself.
    """
    submitit = _submitit()

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls):
            return 2  # above submitit's check for srun, which a dry run does not need; `submit` checks for sbatch

    options = request.options
    jobs.check_count("--nodes", options.nodes)
    jobs.check_count("--processes_per_node", options.processes_per_node)
    if "%" in str(request.workdir.absolute()):
        raise UserError(f"--workdir={request.workdir}: Slurm replaces '%' in names of logs; choose a directory without it")
    given = _options(request.rest)
    _check_gpus(given, options.nodes, options.processes_per_node)
    # Since Slurm 22.05 srun no longer takes it from sbatch.
    per_task = [f"--cpus-per-task={given['cpus-per-task']}"] if "cpus-per-task" in given else []
    job = OF_ARRAY if len(request.only) > 1 else JOB
    teardown = TEARDOWN.format(max_restarts=request.max_restarts, job=job)
    executor = Executor(_folder(request.workdir))
    executor.update_parameters(
        job_name=jobs.slug(request.workdir),
        nodes=options.nodes,
        ntasks_per_node=options.processes_per_node,
        time=None,  # the default of the partition
        wckey=None,
        stderr_to_stdout=True,
        srun_args=per_task,
        setup=list(options.setup) or None,
        teardown=teardown.splitlines(),
        additional_parameters={"requeue": True, "signal": f"TERM@{WARNING}", **given},
    )
    return executor


def _options(rest) -> dict:
    """{'partition': 'a100', 'exclusive': True} of ['--partition=a100', '--exclusive']."""
    given = {}
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if not argument.startswith("--") or not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
            raise UserError(f"argument {argument!r} is not understood; options of sbatch look like --partition=a100")
        if name in OURS or name.startswith("ntasks"):
            raise UserError(f"--{name} is set by submit; see --nodes, --processes_per_node and --workdir")
        given[name] = value if equals else True
    return given


def _check_gpus(given: dict, nodes: int, processes: int) -> None:
    """Raises UserError where the processes of a node would not have one GPU each.

    A single process takes all GPUs. With several, JAX gives process i of a node its GPU i, so each process has to see all of them.
    """
    if nodes * processes == 1:
        return
    if "gpus-per-task" in given:
        raise UserError(
            f"--gpus-per-task={given['gpus-per-task']} hides the other GPUs of a node from each process, and JAX counts them all; "
            f"give --gpus-per-node={processes}"
        )
    gpus = _gpus(given, nodes)
    if gpus and gpus != processes:
        raise UserError(
            f"--processes_per_node={processes} on nodes with {gpus:g} GPUs each, and JAX gives each of several processes one GPU; "
            f"give --processes_per_node={max(1, int(gpus))}, or ask for as many GPUs as processes"
        )


def _gpus(given: dict, nodes: int) -> float:
    """GPUs per node by the options of sbatch: --gres=gpu:a100:8, --gpus-per-node=8, --gpus=16; 0 without such an option."""

    def count(items) -> int:
        last = [item.rpartition(":")[2] for item in items]
        return sum(int(n) if n.isdigit() else 1 for n in last)  # gpu and gpu:a100 mean one

    wanted = {name: str(given.get(name, "")).split(",") for name in ("gres", "gpus-per-node", "gpus")}
    gres = [item for item in wanted["gres"] if item.removeprefix("gres/").partition(":")[0] == "gpu"]
    return count(gres) or count(filter(None, wanted["gpus-per-node"])) or count(filter(None, wanted["gpus"])) / nodes


def _tasks(request: jobs.JobRequest) -> list[list[str]]:
    """The command of each job of an array; of a training there is one."""
    return [[*launch_command(), *request.arguments(only=only)] for only in request.only or (None,)]


def _folder(workdir: Path) -> Path:
    return workdir.absolute() / "slurm"


def _counted(states: list[str]) -> str:
    """'2 completed, 1 failed'"""
    return ", ".join(f"{count} {name.lower()}" for name, count in sorted(Counter(states).items()))


def _accounted(job: dict) -> jobs.JobState:
    """The state by `sacct`, where Slurm keeps accounts."""
    shown = ""
    if shutil.which("sacct") is not None:
        try:
            shown = jobs.call(
                ["sacct", "--jobs", job["id"], "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode"]
            )
        except UserError as error:
            if "accounting storage is disabled" not in str(error):
                raise
    lines = shown.strip().splitlines()
    if len(lines) > 1:
        return jobs.JobState(False, _counted([line.partition("|")[0] for line in lines]))
    name, _, code = shown.strip().partition("|")
    return jobs.JobState(
        False, f"{name.lower()}, exit code {code.partition(':')[0]}" if name else "no longer known to Slurm"
    )
