"""The JobSet manifest of a job on GKE.

Kueue queues the JobSet (by its label). JobSet starts its pods as a gang, and restarts all of them if one is preempted.
A pod whose command failed ends the JobSet, because a program error does not go away by itself.
"""

from typing import Any

from launcher.accelerators import CHIPS_PER_HOST
from launcher.options import GkeOptions, JobOptions

LABEL = "simpo-launch"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# Exit code of a container after SIGTERM. Not that of SIGKILL, which also results from running out of memory.
_SIGTERM_EXIT_CODES = [143]
_GRACE_SECONDS = 30
_KEPT_SECONDS = 24 * 3600
# Unlimited, as far as the field allows.
_ENDLESS = 2**31 - 1
# Ports through which libtpu processes reach each other, and through which they are monitored.
_PORTS = (8471, 8080)


def secret_name(run_id: str) -> str:
    """Return the name of the Secret with the job's variables."""
    return f"{run_id}-environment"


def secret_manifest(job: JobOptions, jobset_uid: str) -> dict[str, Any]:
    """Return the Secret with all variables of the job. It is deleted with the JobSet that owns it."""
    owner = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": job.run_id, "uid": jobset_uid}
    metadata = {"name": secret_name(job.run_id), "labels": {LABEL: job.run_id}, "ownerReferences": [owner]}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": dict(job.environment)}


def jobset_manifest(gke: GkeOptions, job: JobOptions, image: str) -> dict[str, Any]:
    """Return the JobSet of a job: one pod per host of one slice."""
    hosts = gke.tpu_type.hosts
    restarts = job.retries if job.retries >= 0 else _ENDLESS
    program_failed = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "job", "operator": "NotIn", "values": _SIGTERM_EXIT_CODES},
    }
    # Evaluated first: an evicted pod counts as one that may be restarted.
    evicted = {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    slice_job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [evicted, program_failed]},
        "template": {"metadata": {"labels": {LABEL: job.run_id}}, "spec": _pod(gke, job, image)},
    }
    failure = {
        "maxRestarts": restarts,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.run_id,
            "labels": {LABEL: job.run_id, QUEUE_LABEL: gke.queue},
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "ttlSecondsAfterFinished": _KEPT_SECONDS,
            "failurePolicy": failure,
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": slice_job}}],
        },
    }


def _pod(gke: GkeOptions, job: JobOptions, image: str) -> dict[str, Any]:
    tpu_type = gke.tpu_type
    chips = tpu_type.chips if tpu_type.hosts == 1 else CHIPS_PER_HOST
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpu_type.generation.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": tpu_type.topology,
    }
    if gke.capacity == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "job",
        "image": image,
        # Kubernetes expands $(NAME), and reads $$ as $.
        "command": [word.replace("$", "$$") for word in job.command],
        "envFrom": [{"secretRef": {"name": secret_name(job.run_id)}}],
        "ports": [{"containerPort": port} for port in _PORTS],
        "securityContext": {"privileged": True},
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    return {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "serviceAccountName": gke.service_account,
        "nodeSelector": selector,
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
