"""The options of a launch, validated at construction."""

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
# A TPU of these types may be preempted at any moment.
INTERRUPTIBLE = ("spot", "best-effort")

# Google Cloud's rule for names. They are also used as container and JobSet names.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A JobSet's name is the prefix of its pods' names, which may have 63 characters.
_LONGEST_RUN_ID = 40


def parse_capacity(text: str) -> str:
    """Resolve a capacity type or an alias of one.

    Raises:
        BadUsage: the capacity type is unknown.
    """
    capacity = CAPACITY_ALIASES.get(text, text)
    if capacity not in CAPACITY_TYPES:
        allowed = ", ".join([*CAPACITY_TYPES, "preemptible (the old name for spot)"])
        raise BadUsage(f"Unknown capacity type: {text}; choose one of {allowed}")
    return capacity


def _require_name(flag: str, value: str, longest: int = 63) -> None:
    if not _NAME.fullmatch(value) or len(value) > longest:
        raise BadUsage(
            f"{flag} {value!r}: names begin with a lowercase letter, contain only lowercase letters, digits and "
            f"dashes, and have at most {longest} characters"
        )


@dataclasses.dataclass(frozen=True)
class PollTiming:
    """Time limits and intervals of a launch, in seconds.

    Attributes:
        poll: Interval between two checks of a cloud resource that the launcher waits for.
        tick: Interval between two checks of the launcher's own threads.
        start: Limit from the moment capacity is found until every host can be reached, or every pod is running.
        reach: How long a host of a healthy TPU may be silent while its job is running.
        grace: How long the other hosts have to exit by themselves after one has failed.
        preemption_notice: How long after a failure an interruptible TPU is watched for a preemption that explains it.
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
    """The command that runs on each host, and how it is launched.

    Attributes:
        command: Program and arguments.
        environment: Environment variables of the job, including secrets.
        run_id: Name of the job, the same for all its attempts; "" to derive it from the command.
        retries: How often a lost TPU is re-created; no limit if negative.
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
            f"the command begins with {command[0]!r}, which is not a program; flags of the launcher, such as -e, go "
            "before --"
        )


def _check_variable(name: str, value: str) -> None:
    if not _VARIABLE.fullmatch(name):
        raise BadUsage(f"-e {name!r} is not a valid variable name; write -e NAME VALUE, or -e NAME to forward your own")
    if "\n" in value or "\0" in value:
        raise BadUsage(f"-e {name}: a multi-line value cannot be forwarded; put it into a file of the repository")
    if name == "JAX_TRANSFER_GUARD" and value.startswith("disallow"):
        raise BadUsage(
            f"-e {name} {value}: JAX itself transfers values when it starts, so the job would fail; leave it out"
        )


def derived_run_id(command: tuple[str, ...]) -> str:
    """Return a name that is the same for the same command: the script's name and a hash of all words."""
    scripts = [word for word in command if word.endswith(".py")] or [command[0]]
    stem = re.sub(r"[^a-z0-9]+", "-", pathlib.PurePath(scripts[0]).stem.lower()).strip("-")[:24].strip("-")
    stem = stem if stem[:1].isalpha() else f"job-{stem}".strip("-")
    return f"{stem}-{hashlib.sha256(json.dumps(command).encode()).hexdigest()[:8]}"


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """The source of the code that runs on the hosts.

    Attributes:
        uri: An existing image; "" to build one from the tracked files.
        repository: Repository of Artifact Registry in the zone's region.
        name: Name of the image in the repository.
        use_docker: If False, ship the tracked files and set up a virtual environment on each host.
    """

    uri: str = ""
    repository: str = "simpo"
    name: str = "simpo-pipeline"
    use_docker: bool = True

    def __post_init__(self) -> None:
        if self.uri and not self.use_docker:
            raise BadUsage("--image names a container image, and --no_docker uses none; give only one of them")
        _require_name("--docker_repository", self.repository)
        _require_name("--image_name", self.name)


@dataclasses.dataclass(frozen=True)
class TpuLocation:
    """The name and the location of a TPU VM."""

    tpu_name: str
    zone: str
    project: str

    def __post_init__(self) -> None:
        _require_name("--tpu_name", self.tpu_name)
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", self.zone):
            raise BadUsage(f"--zone {self.zone!r} is not a zone; write one such as us-central1-a")

    @property
    def region(self) -> str:
        """The region of the zone, such as us-central1."""
        return self.zone.rpartition("-")[0]

    def command_line(self, subcommand: str) -> str:
        """Return the launcher's command line for a subcommand, such as `clean`, on this TPU."""
        flags = shlex.join(["--tpu_name", self.tpu_name, "--zone", self.zone, "--project", self.project])
        return f"python infra/launch.py {subcommand} {flags}"


@dataclasses.dataclass(frozen=True)
class TpuOptions:
    """The TPU that a launch requests.

    Attributes:
        capacity: One of CAPACITY_TYPES.
        version: Image of the TPU VM; "" for the default of the type.
        service_account: Service account of the hosts; "" for Compute Engine's default.
    """

    place: TpuLocation
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
    """A GKE cluster with JobSet and Kueue, and the slice that a launch requests from it.

    Attributes:
        cluster: Name of the cluster; "" for the one that kubectl is configured for.
        location: Zone or region of the cluster.
        project: Project of the cluster; "" if there is no cluster to look up.
        queue: Name of Kueue's LocalQueue.
        service_account: Kubernetes service account, bound to one that may write to the bucket.
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
            raise BadUsage(
                f"--backend gke: GKE does not offer {self.tpu_type.name}; use v4 or later, or --backend tpu-vm"
            )
        if self.capacity not in ("on-demand", "spot", "reserved"):
            raise BadUsage(
                f"--backend gke does not support capacity {self.capacity!r}; use on-demand, spot or reserved"
            )
        if self.cluster and not self.location:
            raise BadUsage("--cluster needs --zone, the cluster's zone or region")
        _require_name("--namespace", self.namespace)
        _require_name("--queue", self.queue)
