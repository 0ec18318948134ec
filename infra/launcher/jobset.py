"""The JobSet manifest of a job on GKE.

Kueue queues it (the label), JobSet starts its pods as a gang and starts all of them again when one was preempted. A pod
whose command failed ends the JobSet: an error of the program does not go away by itself.
"""

from typing import Any

from launcher.accelerators import CHIPS_PER_HOST
from launcher.options import GkeOptions, JobOptions

LABEL = "simpo-launch"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# What a container ends with that was told to end (SIGTERM). Not what a kill leaves, for so does want of memory.
_TOLD_TO_END = [143]
_GRACE_SECONDS = 30
_KEPT_SECONDS = 24 * 3600
# Without end, as far as the field allows.
_ENDLESS = 2**31 - 1
# How one process of libtpu reaches the others, and how it is watched.
_PORTS = (8471, 8080)


def secret_name(run_id: str) -> str:
    """Of the Secret that holds the job's variables."""
    return f"{run_id}-environment"


def secret_manifest(job: JobOptions, jobset_uid: str) -> dict[str, Any]:
    """The job's variables, secrets among them; deleted with the JobSet that owns them."""
    owner = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": job.run_id, "uid": jobset_uid}
    metadata = {"name": secret_name(job.run_id), "labels": {LABEL: job.run_id}, "ownerReferences": [owner]}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": dict(job.environment)}


def jobset_manifest(gke: GkeOptions, job: JobOptions, image: str) -> dict[str, Any]:
    """One pod a host of one slice."""
    hosts = gke.tpu_type.hosts
    restarts = job.retries if job.retries >= 0 else _ENDLESS
    program_failed = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "job", "operator": "NotIn", "values": _TOLD_TO_END},
    }
    # Looked at first: a pod that is evicted counts as one that may be started again.
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
        # Kubernetes puts values in the place of $(NAME), and takes $$ for $.
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
