"""The part of the records of a step and of an experiment that is known before anything runs."""

import hashlib
from typing import Any

from simpo_pipeline.executor.planning.graph import Graph, Step
from simpo_pipeline.executor.planning.identity import EdgeKind
from simpo_pipeline.executor.planning.resolve import json_text, to_json
from simpo_pipeline.executor.records.provenance import script_name
from simpo_pipeline.executor.records.secrets import redact_json
from simpo_pipeline.storage.json_text import without_nan
from simpo_pipeline.storage.paths import join


def step_info(graph: Graph, step: Step, config: Any) -> dict[str, Any]:
    """Return the part of `.executor_info` that is known before the step runs. The key names are Marin's."""
    needs = dict.fromkeys(edge.step for edge in graph.edges[step] if edge.kind is not EdgeKind.PSEUDO)
    identity = graph.identities[step]
    return {
        "name": step.name,
        "fn_name": function_name(step),
        "description": step.description,
        "version": without_nan(identity.version),
        "version_str": identity.version_str,
        "config": redact_json(without_nan(to_json(config))),
        "dependencies": [graph.output_paths[need] for need in needs],
        "override_output_path": step.override_output_path,
        "pip_dependency_groups": step.pip_dependency_groups,
        "resources": without_nan(to_json(step.resources)),
        "output_path": graph.output_paths[step],
    }


def function_name(step: Step) -> str:
    """Return the import path of the step's function, so that it can be found. It is not part of the identity."""
    module, name = getattr(step.fn, "__module__", None), getattr(step.fn, "__qualname__", None)
    return f"{module}.{name}" if name else type(step.fn).__name__


def run_record_path(base_path: str, infos: list[dict[str, Any]]) -> str:
    """Return the path of an experiment's record. The same experiment always writes the same file."""
    semantics = [{key: value for key, value in info.items() if key != "description"} for info in infos]
    digest = hashlib.sha256(json_text(semantics).encode()).hexdigest()
    return join(base_path, f"{script_name()}-{digest[:6]}.json")
