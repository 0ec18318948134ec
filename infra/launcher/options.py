"""What a launch is told: values checked when they are made."""

import dataclasses
import hashlib
import json
import pathlib
import re
import shlex
from collections.abc import Mapping

from launcher.accelerators import TpuType
from launcher.errors import BadUsage

CAPACITY_TYPES = ("on-demand", "spot", "reserved", "best-effort")
CAPACITY_ALIASES = {"preemptible": "spot", "on_demand": "on-demand", "best_effort": "best-effort"}
# These may lose their TPU at any moment.
INTERRUPTIBLE = ("spot", "best-effort")

# Google Cloud's rule for names; they become container and JobSet names too.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A JobSet's name becomes the beginning of its pods' names, which may have 63 letters.
_LONGEST_RUN_ID = 40


def parse_capacity(text: str) -> str:
    """The capacity type; raises BadUsage for an unknown one."""
    capacity = CAPACITY_ALIASES.get(text, text)
    if capacity not in CAPACITY_TYPES:
        allowed = ", ".join([*CAPACITY_TYPES, "preemptible (the old name of spot)"])
        raise BadUsage(f"Unknown capacity type: {text}; choose one of {allowed}")
    return capacity


def _require_name(flag: str, value: str, longest: int = 63) -> None:
    if not _NAME.fullmatch(value) or len(value) > longest:
        raise BadUsage(
            f"{flag} {value!r}: names begin with a small letter, have only small letters, digits and dashes, and at "
            f"most {longest} of them"
        )


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long things may take, in seconds.

    Attributes:
        poll: Between two looks at something in the cloud that is being waited for.
        tick: Between two looks at what threads of the launcher have done.
        start: From the moment capacity is found until every host can be reached, or every pod runs.
        reach: A host of a healthy TPU may stay silent for so long while its job runs.
        grace: What the other hosts get to end by themselves when one has failed.
        preemption_notice: So long after a failure an interruptible TPU is watched for the preemption behind it.
    """

    poll: float = 10.0
    tick: float = 0.2
    start: float = 1800.0
    reach: float = 300.0
    grace: float = 60.0
    preemption_notice: float = 60.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise BadUsage(f"{field.name} must be a number of seconds above 0, got {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """What runs on each host.

    Attributes:
        command: Program and arguments.
        environment: Variables of the job, secrets among them.
        run_id: The job's name, the same for all its attempts; "" for one that the command gives.
        retries: How often a TPU that was lost is made anew; below 0 without end.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    run_id: str = ""
    retries: int = 10
    foreground: bool = False
    autodelete: bool = False

    def __post_init__(self) -> None:
        _check_command(self.command)
        for name, value in self.environment.items():
            _check_variable(name, value)
        if not self.run_id:
            object.__setattr__(self, "run_id", derived_run_id(self.command))
        _require_name("--run_id", self.run_id, _LONGEST_RUN_ID)


def _check_command(command: tuple[str, ...]) -> None:
    if not command or not command[0]:
        raise BadUsage("the command is missing; write it after --, such as: -- python experiments/m11_interleave.py")
    if command[0].startswith("-"):
        raise BadUsage(
            f"the command begins with {command[0]!r}, which is no program; flags of the launcher, such as -e, go "
            "before --"
        )


def _check_variable(name: str, value: str) -> None:
    if not _VARIABLE.fullmatch(name):
        raise BadUsage(f"-e {name!r} is no name of a variable; write -e NAME VALUE, or -e NAME to pass on your own")
    if "\n" in value or "\0" in value:
        raise BadUsage(f"-e {name}: a value of several lines cannot be passed on; put it into a file of the repository")
    if name == "JAX_TRANSFER_GUARD" and value.startswith("disallow"):
        raise BadUsage(
            f"-e {name} {value}: jax itself moves values when it starts, and the job would end there; leave it out"
        )


def derived_run_id(command: tuple[str, ...]) -> str:
    """The same for the same command: a name from its script, and a hash of all its words."""
    scripts = [word for word in command if word.endswith(".py")] or [command[0]]
    stem = re.sub(r"[^a-z0-9]+", "-", pathlib.PurePath(scripts[0]).stem.lower()).strip("-")[:24].strip("-")
    stem = stem if stem[:1].isalpha() else f"job-{stem}".strip("-")
    return f"{stem}-{hashlib.sha256(json.dumps(command).encode()).hexdigest()[:8]}"


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """Where the code comes from on the hosts.

    Attributes:
        uri: An image that exists already; "" to build one from the tracked files.
        repository: Of Artifact Registry, in the zone's region.
        name: Of the image in it.
        use_docker: False ships the tracked files and sets up a virtual environment on each host.
    """

    uri: str = ""
    repository: str = "simpo"
    name: str = "simpo-pipeline"
    use_docker: bool = True

    def __post_init__(self) -> None:
        if self.uri and not self.use_docker:
            raise BadUsage("--image names a container image, and --no_docker wants none; give only one of them")
        _require_name("--docker_repository", self.repository)
        _require_name("--image_name", self.name)


@dataclasses.dataclass(frozen=True)
class Place:
    """A TPU VM by its name, and where it is."""

    tpu_name: str
    zone: str
    project: str

    def __post_init__(self) -> None:
        _require_name("--tpu_name", self.tpu_name)
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", self.zone):
            raise BadUsage(f"--zone {self.zone!r} is no zone; write one such as us-central1-a")

    @property
    def region(self) -> str:
        """The zone without its last letter."""
        return self.zone.rpartition("-")[0]

    @property
    def flags(self) -> str:
        """The flags of this launcher that name this TPU."""
        return shlex.join(["--tpu_name", self.tpu_name, "--zone", self.zone, "--project", self.project])


@dataclasses.dataclass(frozen=True)
class TpuOptions:
    """The TPU that a launch wants.

    Attributes:
        capacity: One of CAPACITY_TYPES.
        version: The image of the TPU VM; "" for the one that goes with the type.
        service_account: Whose rights the hosts have; "" for Compute Engine's default.
    """

    place: Place
    tpu_type: TpuType
    capacity: str = "on-demand"
    version: str = ""
    service_account: str = ""

    @property
    def runtime_version(self) -> str:
        """The image of the TPU VM."""
        return self.version or self.tpu_type.generation.runtime_version


@dataclasses.dataclass(frozen=True)
class GkeOptions:
    """A GKE cluster with JobSet and Kueue, and what is wanted of it.

    Attributes:
        cluster: "" for the one that kubectl talks to already.
        location: The cluster's zone or region.
        project: Its project; "" if there is no cluster to look up.
        queue: The LocalQueue of Kueue.
        service_account: Of Kubernetes, bound to one that may write to the bucket.
    """

    tpu_type: TpuType
    cluster: str = ""
    location: str = ""
    project: str = ""
    namespace: str = "default"
    queue: str = "multislice-queue"
    capacity: str = "on-demand"
    service_account: str = "default"

    def __post_init__(self) -> None:
        if not self.tpu_type.generation.gke_accelerator:
            raise BadUsage(f"--backend gke: GKE has no {self.tpu_type.name}; take v4 or later, or --backend tpu-vm")
        if self.capacity not in ("on-demand", "spot", "reserved"):
            raise BadUsage(f"--backend gke has no capacity {self.capacity!r}; choose on-demand, spot or reserved")
        if self.cluster and not self.location:
            raise BadUsage("--cluster needs --zone, the cluster's zone or region")
        _require_name("--namespace", self.namespace)
        _require_name("--queue", self.queue)
