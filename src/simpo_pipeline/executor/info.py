"""The records of what ran: `.executor_info` beside each step's outputs, and one file per experiment.

Never in them: environment variables, or anything else that may hold a secret.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

from simpo_pipeline.errors import StorageError
from simpo_pipeline.executor.graph import Graph, Step
from simpo_pipeline.executor.holder import utc_now
from simpo_pipeline.executor.identity import EdgeKind
from simpo_pipeline.executor.provenance import Provenance
from simpo_pipeline.executor.resolve import json_text, to_json
from simpo_pipeline.executor.secrets import blotted_values
from simpo_pipeline.executor.status import INFO_FILE
from simpo_pipeline.storage.files import read_bytes
from simpo_pipeline.storage.paths import join


@dataclass(frozen=True)
class Ended:
    """How a run of a step ended well."""

    seconds: float
    live_digest: str | None


def step_info(graph: Graph, step: Step, config: Any) -> dict[str, Any]:
    """What `.executor_info` says about a step before it runs; the names are Marin's."""
    needs = dict.fromkeys(edge.step for edge in graph.edges[step] if edge.kind is not EdgeKind.PSEUDO)
    identity = graph.identities[step]
    return {
        "name": step.name,
        "fn_name": function_name(step),
        "description": step.description,
        "version": identity.version,
        "version_str": identity.version_str,
        "config": blotted_values(to_json(config)),
        "dependencies": [graph.output_paths[need] for need in needs],
        "override_output_path": step.override_output_path,
        "pip_dependency_groups": step.pip_dependency_groups,
        "resources": to_json(step.resources),
        "output_path": graph.output_paths[step],
    }


def info_record(
    info: Mapping[str, Any], run_id: str, provenance: Provenance, started: str, ended: Ended | None
) -> dict[str, Any]:
    """What `.executor_info` holds while a step runs; more when it has ended."""
    record: dict[str, Any] = {**info, "run_id": run_id, **provenance.as_json(), "created_date": started}
    if ended is not None:
        record |= {"finished_date": utc_now(), "seconds": ended.seconds, "live_digest": ended.live_digest}
    return record


def read_info(output_path: str) -> dict[str, Any]:
    """The record beside the outputs.

    Raises:
        PathNotFoundError: nothing ran there.
        StorageError: the record is damaged.
    """
    path = join(output_path, INFO_FILE)
    data = read_bytes(path)
    try:
        info = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path!r} is no JSON ({error}). Remove the step's status to run it again.") from error
    if not isinstance(info, dict):
        raise StorageError(f"{path!r} is no JSON object. Remove the step's status to run it again.")
    return cast(dict[str, Any], info)


def function_name(step: Step) -> str:
    """Where the step's function lies, to find it by; not part of the identity."""
    module, name = getattr(step.fn, "__module__", None), getattr(step.fn, "__qualname__", None)
    return f"{module}.{name}" if name else type(step.fn).__name__


def script_name() -> str:
    """The name of the script that was started."""
    return PurePath(sys.argv[0]).stem or "python"


def run_record_path(base_path: str, infos: list[dict[str, Any]]) -> str:
    """Where the record of an experiment goes: the same experiment writes the same file."""
    semantics = [{key: value for key, value in info.items() if key != "description"} for info in infos]
    digest = hashlib.sha256(json_text(semantics).encode()).hexdigest()
    return join(base_path, f"{script_name()}-{digest[:6]}.json")
