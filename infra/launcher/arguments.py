"""The command-line arguments of the launcher."""

import argparse
import pathlib
import shutil
from collections.abc import Sequence

from launcher.errors import BadUsage

SUBCOMMANDS = ("logs", "status", "stop", "clean")
BACKENDS = ("tpu-vm", "gke", "local")

DESCRIPTION = """Start a job on many hosts.

  python infra/launch.py --foreground --zone us-central1-a --tpu_name NAME --tpu_type v5p-32 \\
      --capacity_type on-demand -- python experiments/m11_interleave.py --preset llama3_8b_v5p_32 --prefix gs://BUCKET
  python infra/launch.py logs|status|stop|clean --tpu_name NAME     logs --foreground follows; stop stops the job;
                                                                    clean deletes the TPU
  python infra/launch.py --backend gke --cluster NAME --tpu_type v5p-32 --foreground -- COMMAND
  python infra/launch.py --local 4 --devices_per_host 2 -- COMMAND  local processes

If the command exits with code 0 on every host, the last line is `Job finished with no error.` and the exit code is 0.
Otherwise the exit code is that of the first host that failed, and its last lines are shown. See infra/README.md.
"""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _where(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where")
    group.add_argument("--backend", choices=BACKENDS, help="default: tpu-vm with --tpu_name, local with --local")
    group.add_argument("--tpu_name", default="", help="name of the TPU VM and of its queued resource")
    group.add_argument("--zone", default="", help="default: from `gcloud config`; gke: zone or region of the cluster")
    group.add_argument("--project", default="", help="default: from `gcloud config`")
    group.add_argument("--cluster", default="", help="gke; default: the cluster that kubectl is configured for")
    group.add_argument("--namespace", default="default", help="gke: the Kubernetes namespace")
    group.add_argument("--run_id", default="", help="name of the job; default: derived from the command")
    group.add_argument("--foreground", action="store_true", help="show the output of all hosts until the job finishes")
    group.add_argument("--dry_run", action="store_true", help="print all commands; run none that changes anything")


def _capacity(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the TPU")
    group.add_argument("--tpu_type", default="", help="such as v5p-32")
    group.add_argument("--capacity_type", default="", help="on-demand (default), spot, reserved or best-effort")
    for alias in ("on-demand", "spot", "preemptible", "reserved"):
        group.add_argument(f"--{alias}", dest="capacity_type", action="store_const", const=alias)
    group.add_argument("--version", default="", help="image of the TPU VM; default: the one for the type")
    group.add_argument("--node_count", type=int, default=1, help="number of slices; must be 1")
    group.add_argument("--service_account", default="", help="service account of the hosts")
    group.add_argument("--queue", default="multislice-queue", help="gke: Kueue's LocalQueue")
    group.add_argument("--retries", type=int, default=10, help="how often to re-create a lost TPU; negative: no limit")
    group.add_argument("--start_timeout", type=_seconds, default=1800.0, help="seconds from capacity to ready hosts")
    group.add_argument("--autodelete", action="store_true", help="delete the TPU when the followed job has finished")


def _code(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the code")
    group.add_argument("--image", default="", help="an existing container image")
    group.add_argument("--image_name", default="simpo-pipeline", help="name of the image to build")
    group.add_argument("--docker_repository", default="simpo", help="repository in Artifact Registry")
    group.add_argument("--no_docker", action="store_true", help="ship the tracked files and use uv on the hosts")
    group.add_argument(
        "-e",
        dest="environment",
        nargs="+",
        action="append",
        default=[],
        metavar="NAME [VALUE]",
        help="an environment variable; write NAME=VALUE for a value that begins with a dash",
    )


def parser_of(subcommand: str) -> argparse.ArgumentParser:
    """Return the parser of a launch, or of a subcommand."""
    parser = argparse.ArgumentParser(
        prog=f"launch.py {subcommand}".strip(),
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _where(parser)
    if not subcommand:
        _capacity(parser)
        _code(parser)
        local = parser.add_argument_group("local processes")
        local.add_argument("--local", type=_positive, metavar="N", help="number of processes")
        local.add_argument("--devices_per_host", type=_positive, default=1, help="CPU devices per process")
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line into its flags, `subcommand` ("" for a launch), and the command after `--`."""
    subcommand = words[0] if words and words[0] in SUBCOMMANDS else ""
    rest = list(words[1:] if subcommand else words)
    own, command = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, [])
    parser = parser_of(subcommand)
    flags, unknown = parser.parse_known_args(own)
    if unknown:
        hint = "; write a value that begins with a dash as -e NAME=VALUE" if "-e" in own else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    flags.subcommand = subcommand
    flags.command = tuple(command)
    try:
        flags.backend = _backend(flags)
        _check(flags)
    except BadUsage as error:
        parser.error(str(error))
    return flags


def _backend(flags: argparse.Namespace) -> str:
    is_local = getattr(flags, "local", None) is not None
    chosen: str = flags.backend or ("local" if is_local else "tpu-vm" if flags.tpu_name else "")
    if not chosen:
        raise BadUsage(
            "no backend selected: give --tpu_name NAME for a TPU VM, --backend gke, or --local N for this machine"
        )
    if is_local and chosen != "local":
        raise BadUsage(f"--local N starts processes on this machine; leave it out for --backend {chosen}")
    if chosen == "tpu-vm" and not flags.tpu_name:
        raise BadUsage("--backend tpu-vm needs --tpu_name NAME")
    if chosen == "local" and not is_local:
        raise BadUsage("--backend local needs --local N, the number of processes")
    return chosen


def _check(flags: argparse.Namespace) -> None:
    if flags.subcommand:
        if flags.command:
            raise BadUsage(f"`{flags.subcommand}` takes no command after --")
        return
    if not flags.command:
        raise BadUsage("the command is missing; write it after --, such as: -- python experiments/m11_interleave.py")
    if flags.autodelete and not flags.foreground:
        raise BadUsage("--autodelete deletes the TPU when the followed job has finished; give --foreground too")
    if flags.backend == "local":
        program = flags.command[0]
        if not pathlib.Path(program).exists() and shutil.which(program) is None:
            raise BadUsage(f"program {program!r} was not found")
        return
    if not flags.tpu_type:
        raise BadUsage("--tpu_type is missing; write KIND-SIZE, such as v5p-32")
    if flags.node_count != 1:
        raise BadUsage(
            f"--node_count {flags.node_count} requests {flags.node_count} slices of {flags.tpu_type}, not hosts: "
            "a slice already includes all its hosts, and a job runs on one slice; leave it out"
        )
    if flags.backend == "gke" and flags.no_docker:
        raise BadUsage("--no_docker is for --backend tpu-vm; pods on GKE start from an image")
