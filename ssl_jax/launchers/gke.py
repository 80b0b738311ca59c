"""`submit --to=gke`: a JobSet of TPU slices on Google Kubernetes Engine, by kubectl. A pod is a host and a process of the run.

GKE sets TPU_WORKER_HOSTNAMES and MEGASCALE_COORDINATOR_ADDRESS, by which JAX joins the pods of a slice and the slices. A pod that
does not end with 0 fails its Job, and the JobSet restarts all Jobs; exit code 2 (bad input) fails the JobSet. A pod that is deleted
has two minutes to save, less on a node that is preempted. The runs of a sweep are an indexed Job without a JobSet: a pod for each run,
which restarts alone.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path, PurePosixPath

import yaml

from ssl_jax.errors import UserError
from ssl_jax.launchers import jobs, tpu_slices

GRACE = 120  # seconds between SIGTERM and SIGKILL
CONTAINER, JOB = "train", "slice"
FIELDS = {"id": jobs.NAME, "namespace": jobs.NAME}


def add_arguments(group) -> None:
    group.add_argument("--topology", required=True, help=f"topology of a slice: {tpu_slices.EXAMPLES}")
    group.add_argument("--slices", type=int, default=1, help="number of slices (default: 1)")
    group.add_argument("--image", required=True, help="container image with this repository as its working directory, and jax[tpu]")
    group.add_argument(
        "--claim", required=True, help="PersistentVolumeClaim of a volume that all pods write to, for the workdir"
    )
    group.add_argument(
        "--mount",
        default="/mnt/runs",
        help="where the volume is mounted (default: /mnt/runs); a relative --workdir is below it",
    )
    group.add_argument("--namespace", default="default", help="Kubernetes namespace (default: default)")


def manifest(request: jobs.JobRequest) -> dict:
    """The JobSet, or for the runs of a sweep the Job.

    Raises:
        UserError: an unknown topology, an impossible number of slices, a workdir outside the mount, or a sweep on several hosts.
    """
    options = request.options
    jobs.check_name("--namespace", options.namespace)
    where = tpu_slices.parse(options.topology)
    jobs.check_count("--slices", options.slices)
    if options.slices > 1 and where.hosts == 1:
        raise UserError(
            f"--slices={options.slices}: {options.topology} has one host, and only slices of several hosts can be joined"
        )
    if request.only and where.hosts * options.slices > 1:
        raise UserError(
            f"--topology={options.topology} has {where.hosts} hosts, and each run of a sweep is one pod; give one host, as v5e:2x4"
        )
    mount = PurePosixPath(options.mount)
    workdir = mount / request.workdir.as_posix()  # itself, if absolute
    if not mount.is_absolute() or not workdir.is_relative_to(mount) or ".." in workdir.parts:
        raise UserError(
            f"--workdir={request.workdir} is not below --mount={options.mount}, and a pod's own disk is lost with it"
        )
    container = {
        "name": CONTAINER,
        "image": options.image,
        "command": ["python", "launch.py", *request.arguments(Path(workdir), "$(JOB_COMPLETION_INDEX)")],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # of libtpu, and of the coordinator of slices
        "resources": {kind: {"google.com/tpu": where.chips_of_host} for kind in ("requests", "limits")},
        "volumeMounts": [{"name": "runs", "mountPath": options.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": where.kind.gke,
            "cloud.google.com/gke-tpu-topology": where.shape,
        },
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # for batches of worker processes: the default is 64 MiB
        ],
    }
    bad_input = {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [2]}}
    if request.only:
        return _indexed(request, pod, bad_input | {"action": "FailIndex"})
    job = {
        "completionMode": "Indexed",
        "completions": where.hosts,
        "parallelism": where.hosts,
        "backoffLimit": 0,  # one pod cannot restart alone: the JobSet restarts all
        "podFailurePolicy": {"rules": [bad_input]},
        "template": {"spec": pod},
    }
    name = _name(request)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": options.namespace,
            # one Job per slice
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {
                "maxRestarts": request.max_restarts,
                "rules": [{"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": JOB, "replicas": options.slices, "template": {"spec": job}}],
        },
    }


def _indexed(request: jobs.JobRequest, pod: dict, bad_input: dict) -> dict:
    """A Job with a pod for each run of a sweep. Pods of runs that are done end at once."""
    runs = max(request.only) + 1
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": _name(request), "namespace": request.options.namespace},
        "spec": {
            "completionMode": "Indexed",
            "completions": runs,
            "parallelism": runs,
            "backoffLimitPerIndex": request.max_restarts,
            "maxFailedIndexes": runs,  # a run that fails leaves the others
            "podFailurePolicy": {"rules": [bad_input]},
            "template": {"spec": pod},
        },
    }


def describe(request: jobs.JobRequest) -> str:
    return f"# {shlex.join(_command(request))}\n{_text(request)}"


def submit(request: jobs.JobRequest) -> dict:
    jobs.need("kubectl", "--to=gke submits by it")
    jobs.call(_command(request), stdin=_text(request))
    kind = {"runs": len(request.only)} if request.only else {}
    return {"id": _name(request), "namespace": request.options.namespace, **kind}


def state(job: dict, workdir: Path) -> jobs.JobState:
    jobs.need("kubectl", f"the job of --workdir={workdir} is on GKE")
    shown = jobs.call(["kubectl", "get", _kind(job), job["id"], *_where(job), "--output=json", "--ignore-not-found"])
    if not shown.strip():
        return jobs.JobState(False, "no longer there")
    status = json.loads(shown).get("status", {})
    if _kind(job) == "job":
        true = [row["type"] for row in status.get("conditions", []) if row["status"] == "True"]
        ends = [end for end in true if end in ("Complete", "Failed")]
        counts = [f"{status.get(word, 0)} {word}" for word in ("active", "succeeded", "failed")]
        return jobs.JobState(not ends, ", ".join([*(end.lower() for end in ends), *counts]))
    end = status.get("terminalState", "")
    pods = [f"{row['ready']} slices ready, {row['failed']} failed" for row in status.get("replicatedJobsStatus", [])]
    parts = [end.lower() or "alive", *pods, f"restarted {status.get('restarts', 0)} times"]
    return jobs.JobState(not end, ", ".join(parts))


def cancel(job: dict, workdir: Path) -> None:
    jobs.call(["kubectl", "delete", _kind(job), job["id"], *_where(job), "--wait=false"])


def logs(job: dict, workdir: Path, lines: int, follow: bool) -> None:
    """Show the log of process 0."""
    jobs.need("kubectl", f"the job of --workdir={workdir} is on GKE")
    labels = {
        "jobset.sigs.k8s.io/jobset-name": job["id"],
        "jobset.sigs.k8s.io/job-index": 0,
        "batch.kubernetes.io/job-completion-index": 0,
    }
    chosen = ",".join(f"{label}={value}" for label, value in labels.items())
    jobs.show(
        ["kubectl", "logs", f"--selector={chosen}", *_where(job), f"--tail={lines}", *(["--follow"] if follow else [])]
    )


def _command(request: jobs.JobRequest) -> list[str]:
    # Not `apply`, which would change the JobSet of another user whose workdir has the same name.
    return ["kubectl", "create", f"--namespace={request.options.namespace}", "--filename=-"]


def _text(request: jobs.JobRequest) -> str:
    return yaml.safe_dump(manifest(request), sort_keys=False, width=1000)


def _name(request: jobs.JobRequest) -> str:
    return f"{jobs.slug(request.workdir)}-{request.number}"


def _kind(job: dict) -> str:
    return "job" if "runs" in job else "jobset"


def _where(job: dict) -> list[str]:
    return [f"--namespace={job['namespace']}"]
