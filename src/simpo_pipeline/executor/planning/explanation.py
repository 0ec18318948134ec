"""Why a step is new: its identity compared with those that steps of the same name left beside it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from simpo_pipeline.errors import StorageError
from simpo_pipeline.executor.planning.graph import Graph, Step
from simpo_pipeline.executor.planning.identity import SHORT_HASH_LENGTH
from simpo_pipeline.executor.planning.order import Order
from simpo_pipeline.executor.records.info import read_info
from simpo_pipeline.executor.run import PlanRow
from simpo_pipeline.executor.table import format_table
from simpo_pipeline.storage.files import in_parallel, list_names
from simpo_pipeline.storage.paths import base_name, join, parent

_MAX_SIBLINGS = 20
_MAX_RECORDS_READ = 200
"""Of all steps together: a plan of thousands of new steps must not read thousands of records."""
_MAX_SHOWN = 3
_MAX_DEPTH = 100
"""Of a recorded value that is compared; deeper ones may not fit the stack of the caller."""
_MAX_VALUE_CHARACTERS = 60


@dataclass(frozen=True)
class Difference:
    """One versioned value or dependency that is another one now."""

    field_path: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.field_path}: {self.old} -> {self.new}"


def siblings_by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that look like output paths, by what comes before their hash; only some where there are many."""
    stems: dict[str, list[str]] = {}
    for name in names:
        suffix = name.rpartition("-")[2]
        if len(suffix) == SHORT_HASH_LENGTH and all(character in "0123456789abcdef" for character in suffix):
            siblings = stems.setdefault(stem_of(name), [])
            if len(siblings) <= _MAX_SIBLINGS:
                siblings.append(name)
    return stems


def stem_of(output_path: str) -> str:
    """The last part of an output path without its hash."""
    return base_name(output_path).rpartition("-")[0]


def explain_new_steps(
    configs: Mapping[str, Mapping[str, Any]], names_beside: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """How steps that never ran differ from the nearest of their name that did.

    Args:
        configs: by output path, the versioned config of each new step; the first ones matter most.
        names_beside: by folder, the names in it.

    Returns:
        A sentence by output path, for those that have siblings.
    """
    stems = {folder: siblings_by_stem(names) for folder, names in names_beside.items()}
    siblings = {path: _siblings(path, stems[parent(path)]) for path in configs}
    limit = max(1, _MAX_RECORDS_READ // max(1, sum(bool(found) for found in siblings.values())))
    chosen = [found[:limit] for found in siblings.values() if found][:_MAX_RECORDS_READ]
    read = list(dict.fromkeys(path for found in chosen for path in found))
    recorded = dict(zip(read, in_parallel(recorded_config, read), strict=True))
    return {path: _explanation(config, siblings[path], recorded) for path, config in configs.items() if siblings[path]}


def _siblings(output_path: str, stems: Mapping[str, list[str]]) -> list[str]:
    folder, own = parent(output_path), base_name(output_path)
    return [join(folder, name) for name in stems.get(stem_of(output_path), []) if name != own]


def _explanation(
    config: Mapping[str, Any], siblings: Sequence[str], recorded: Mapping[str, dict[str, Any] | None]
) -> str:
    known = {base_name(path): old for path in siblings if (old := recorded.get(path)) is not None}
    if not known:
        return "never ran under this version; --explain says what is new"
    nearest = nearest_sibling(config, known)
    return summarized(*nearest) if nearest is not None else "never ran"


def recorded_config(output_path: str) -> dict[str, Any] | None:
    """The versioned values and dependencies recorded at an output path; None when there is no record to believe."""
    try:
        version = read_info(output_path).get("version")
    except StorageError:
        return None
    config = cast(dict[str, Any], version).get("config") if isinstance(version, dict) else None
    return cast(dict[str, Any], config) if isinstance(config, dict) and _is_shallow(config) else None


def _is_shallow(value: Any) -> bool:
    """Whether the value can be compared and shown however deep in calls this happens."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _members(outer)]
        if not level:
            return True
    return False


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return cast(dict[str, Any], value).values()
    return cast(list[Any], value) if isinstance(value, list) else ()


def nearest_sibling(
    config: Mapping[str, Any], siblings: Mapping[str, Mapping[str, Any]]
) -> tuple[str, list[Difference]] | None:
    """The sibling with the fewest differences from `config`, and these; None when no sibling differs."""
    found = {sibling: differences(old, config) for sibling, old in siblings.items()}
    differing = {sibling: changes for sibling, changes in found.items() if changes}
    if not differing:
        return None
    nearest = min(differing, key=lambda sibling: len(differing[sibling]))
    return nearest, differing[nearest]


def summarized(sibling: str, changes: Sequence[Difference]) -> str:
    """The first few differences, for a table."""
    more = f"; and {len(changes) - _MAX_SHOWN} more" if len(changes) > _MAX_SHOWN else ""
    return f"new since {sibling}: {'; '.join(str(change) for change in changes[:_MAX_SHOWN])}{more}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """What is not the same in two versioned configs, by field path."""
    absent = object()
    found: list[Difference] = []
    for path in sorted({*old, *new}):
        before, after = old.get(path, absent), new.get(path, absent)
        if before != after:
            shown = ["absent" if value is absent else shown_value(value) for value in (before, after)]
            found.append(Difference(path, shown[0], shown[1]))
    return found


def shown_value(value: Any) -> str:
    """A versioned value or a dependency on one line."""
    if isinstance(value, dict) and "!step" in value:
        use = cast(dict[str, Any], value)
        label = str(use["!step"])
        name, _, identity = label.rpartition("-")
        kind = "" if use.get("use") == "saved" else f" ({use.get('use')})"
        below = f"/{use['sub_path']}" if use.get("sub_path") else ""
        return f"{name}-{identity[:SHORT_HASH_LENGTH]}{below}{kind}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[: _MAX_VALUE_CHARACTERS - 3]}..."


@dataclass(frozen=True)
class Explanation:
    """One step of a plan, explained."""

    step_name: str
    action: str
    """As in the plan; NONE when the plan leaves the step out."""
    reason: str
    version: str
    """The whole hash of the identity, 64 hex digits."""
    output_path: str
    config: dict[str, Any]
    """What bears identity, by field path: versioned values and dependencies."""
    used_by: tuple[str, ...]
    others: dict[str, tuple[Difference, ...]]
    """How each version beside it differs: from what is recorded there to what the step is now."""

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        others = {name: [change.__dict__ for change in changes] for name, changes in self.others.items()}
        return {**self.__dict__, "used_by": list(self.used_by), "others": others}

    def text(self) -> str:
        """For a terminal."""
        lines = [
            f"{self.step_name}  {self.action}: {self.reason}",
            f"  output path  {self.output_path}",
            f"  version      {self.version}",
            f"  used by      {', '.join(self.used_by) or 'no step'}",
            "",
            "Its version is made of its name and of:",
            format_table(("field", "value"), [(path, shown_value(value)) for path, value in self.config.items()]),
        ]
        for name, changes in self.others.items():
            table = format_table(("field", "then", "now"), [(one.field_path, one.old, one.new) for one in changes])
            lines += ["", f"Since {name}:", table]
        if not self.others:
            lines += ["", "No other version of it lies beside it."]
        return "\n".join(lines)


def explain_step(graph: Graph, order: Order, step: Step, row: PlanRow | None) -> Explanation:
    """Reads the records of the other versions beside the step's output path."""
    path, identity = graph.output_paths[step], graph.identities[step]
    names = siblings_by_stem(list_names(parent(path))).get(stem_of(path), [])
    others = [join(parent(path), name) for name in names if name != base_name(path)]
    recorded = dict(zip(others, in_parallel(recorded_config, others), strict=True))
    config = identity.version["config"]
    return Explanation(
        step.name,
        row.action.value if row is not None else "NONE",
        row.reason if row is not None else "this run is not asked for it, and nothing it runs needs it",
        identity.hash,
        path,
        dict(sorted(config.items())),
        tuple(user.name for user in order.steps if any(edge.step is step for edge in graph.edges[user])),
        {base_name(other): tuple(differences(old, config)) for other, old in recorded.items() if old is not None},
    )
