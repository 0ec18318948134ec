"""Explanation of why a step is new: its identity compared with those of steps of the same name in the same folder."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from simpo_pipeline.errors import StorageError
from simpo_pipeline.executor.planning.graph import Graph, Step
from simpo_pipeline.executor.planning.identity import SHORT_HASH_LENGTH, field_below
from simpo_pipeline.executor.planning.order import Order
from simpo_pipeline.executor.records.info import read_info
from simpo_pipeline.executor.run import PlanRow
from simpo_pipeline.executor.table import format_table
from simpo_pipeline.storage.files import in_parallel, list_names
from simpo_pipeline.storage.json_text import without_nan
from simpo_pipeline.storage.paths import base_name, join, parent

_MAX_SIBLINGS = 20
_MAX_RECORDS_READ = 200
"""Limit for all steps together, so that a plan with thousands of new steps does not read thousands of records."""
_MAX_SHOWN = 3
_MAX_DEPTH = 100
"""Maximum nesting of a recorded value that is compared. Deeper values might overflow the caller's stack."""
_MAX_VALUE_CHARACTERS = 60
_ABSENT = object()
_NO_FILES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Difference:
    """One versioned value or dependency that has changed."""

    field_path: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.field_path}: {self.old} -> {self.new}"


def siblings_by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names that look like output paths by the part before the hash. Large groups are truncated."""
    stems: dict[str, list[str]] = {}
    for name in names:
        suffix = name.rpartition("-")[2]
        if len(suffix) == SHORT_HASH_LENGTH and all(character in "0123456789abcdef" for character in suffix):
            siblings = stems.setdefault(stem_of(name), [])
            if len(siblings) <= _MAX_SIBLINGS:
                siblings.append(name)
    return stems


def stem_of(output_path: str) -> str:
    """Return the last part of an output path without its hash."""
    return base_name(output_path).rpartition("-")[0]


def explain_new_steps(
    configs: Mapping[str, Mapping[str, Any]],
    names_beside: Mapping[str, Sequence[str]],
    files: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> dict[str, str]:
    """Explain how each step that never ran differs from the nearest step of the same name that did.

    Args:
        configs: The versioned config of each new step, by output path. The first steps have priority, because the
            number of records that are read is limited.
        names_beside: The names in each folder, by folder.
        files: The files whose content is among the versioned values, by field path, for each output path.

    Returns:
        One sentence for each output path that has siblings.
    """
    stems = {folder: siblings_by_stem(names) for folder, names in names_beside.items()}
    siblings = {path: _siblings(path, stems[parent(path)]) for path in configs}
    limit = max(1, _MAX_RECORDS_READ // max(1, sum(bool(found) for found in siblings.values())))
    chosen = [found[:limit] for found in siblings.values() if found][:_MAX_RECORDS_READ]
    read = list(dict.fromkeys(path for found in chosen for path in found))
    recorded = dict(zip(read, in_parallel(recorded_config, read), strict=True))
    return {
        path: _explanation(config, siblings[path], recorded, files.get(path, _NO_FILES))
        for path, config in configs.items()
        if siblings[path]
    }


def _siblings(output_path: str, stems: Mapping[str, list[str]]) -> list[str]:
    folder, own = parent(output_path), base_name(output_path)
    return [join(folder, name) for name in stems.get(stem_of(output_path), []) if name != own]


def _explanation(
    config: Mapping[str, Any],
    siblings: Sequence[str],
    recorded: Mapping[str, dict[str, Any] | None],
    files: Mapping[str, str],
) -> str:
    known = {base_name(path): old for path in siblings if (old := recorded.get(path)) is not None}
    if not known:
        return "never ran with this version; --explain shows what changed"
    nearest = nearest_sibling(config, known, files)
    return summarized(*nearest) if nearest is not None else "never ran"


def recorded_config(output_path: str) -> dict[str, Any] | None:
    """Return the versioned values and dependencies recorded at an output path, or None if there is no valid record."""
    try:
        version = read_info(output_path).get("version")
    except StorageError:
        return None
    config = cast(dict[str, Any], version).get("config") if isinstance(version, dict) else None
    return cast(dict[str, Any], config) if isinstance(config, dict) and _is_shallow(config) else None


def _is_shallow(value: Any) -> bool:
    """Return whether the value is shallow enough to be compared and shown at any depth of the call stack."""
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
    config: Mapping[str, Any], siblings: Mapping[str, Mapping[str, Any]], files: Mapping[str, str] = _NO_FILES
) -> tuple[str, list[Difference]] | None:
    """Return the sibling with the fewest differences from `config`, and the differences. None if no sibling differs."""
    found = {sibling: differences(old, config, files) for sibling, old in siblings.items()}
    differing = {sibling: changes for sibling, changes in found.items() if changes}
    if not differing:
        return None
    nearest = min(differing, key=lambda sibling: len(differing[sibling]))
    return nearest, differing[nearest]


def summarized(sibling: str, changes: Sequence[Difference]) -> str:
    """Return the first few differences on one line, for a table."""
    more = f"; and {len(changes) - _MAX_SHOWN} more" if len(changes) > _MAX_SHOWN else ""
    return f"changed since {sibling}: {'; '.join(str(change) for change in changes[:_MAX_SHOWN])}{more}"


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], files: Mapping[str, str] = _NO_FILES
) -> list[Difference]:
    """Return the differences between two versioned configs, sorted by field path, with the files that changed.

    Fields of versioned dataclasses and dicts are compared one by one.
    """
    return [
        found
        for path in sorted({*old, *new})
        for found in _differences_at(path, old.get(path, _ABSENT), new.get(path, _ABSENT), files)
    ]


def _differences_at(path: str, before: Any, after: Any, files: Mapping[str, str]) -> Iterator[Difference]:
    # Records hold numbers that are not finite as text.
    if without_nan(before) == without_nan(after):
        return
    if _has_fields(before) and _has_fields(after) and before.get("!dataclass") == after.get("!dataclass"):
        for key in sorted({*before, *after}):
            inner = before.get(key, _ABSENT), after.get(key, _ABSENT)
            yield from _differences_at(field_below(path, key.removeprefix("!")), *inner, files)
        return
    shown = ["absent" if value is _ABSENT else shown_value(value) for value in (before, after)]
    content_of = f" (content of {files[path]})" if path in files else ""
    yield Difference(path, shown[0], f"{shown[1]}{content_of}")


def _has_fields(value: Any) -> bool:
    """Return whether the value is the form of a dataclass or of a dict, which has no tag."""
    tags = [key for key in cast(dict[str, Any], value) if key.startswith("!")] if isinstance(value, dict) else ["!"]
    return all(tag == "!dataclass" or tag.startswith("!!") for tag in tags)


def shown_value(value: Any) -> str:
    """Format a versioned value or a dependency on one line."""
    if isinstance(value, dict) and "!step" in value:
        use = cast(dict[str, Any], value)
        label = str(use["!step"])
        name, _, identity = label.rpartition("-")
        kind = "" if use.get("use") == "saved" else f" ({use.get('use')})"
        below = f"/{use['sub_path']}" if use.get("sub_path") else ""
        return f"{name}-{identity[:SHORT_HASH_LENGTH]}{below}{kind}"
    if isinstance(value, dict) and "!content" in value:
        value = cast(dict[str, Any], value)["!content"]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[: _MAX_VALUE_CHARACTERS - 3]}..."


@dataclass(frozen=True)
class Explanation:
    """Explanation of one step: its action, its identity, its users and its other versions."""

    step_name: str
    action: str
    """The action in the plan. NONE if the plan does not include the step."""
    reason: str
    version: str
    """The full hash of the identity, 64 hex digits."""
    output_path: str
    config: dict[str, Any]
    """The versioned values and dependencies that define the identity, by field path."""
    used_by: tuple[str, ...]
    others: dict[str, tuple[Difference, ...]]
    """For each other version in the same folder, the differences from its recorded config to that of the step."""

    def as_json(self) -> dict[str, Any]:
        """Return the explanation for --json."""
        others = {name: [change.__dict__ for change in changes] for name, changes in self.others.items()}
        return {**self.__dict__, "used_by": list(self.used_by), "others": others}

    def text(self) -> str:
        """Return the explanation for a terminal."""
        lines = [
            f"{self.step_name}  {self.action}: {self.reason}",
            f"  output path  {self.output_path}",
            f"  version      {self.version}",
            f"  used by      {', '.join(self.used_by) or 'no step'}",
            "",
            "The version is computed from the name of the step and these fields:",
            format_table(("field", "value"), [(path, shown_value(value)) for path, value in self.config.items()]),
        ]
        for name, changes in self.others.items():
            table = format_table(("field", "then", "now"), [(one.field_path, one.old, one.new) for one in changes])
            lines += ["", f"Changes since {name}:", table]
        if not self.others:
            lines += ["", "No other version of this step exists in the same folder."]
        return "\n".join(lines)


def explain_step(graph: Graph, order: Order, step: Step, row: PlanRow | None) -> Explanation:
    """Explain one step. Reads the records of the other versions in the folder of its output path."""
    path, identity = graph.output_paths[step], graph.identities[step]
    names = siblings_by_stem(list_names(parent(path))).get(stem_of(path), [])
    others = [join(parent(path), name) for name in names if name != base_name(path)]
    recorded = dict(zip(others, in_parallel(recorded_config, others), strict=True))
    config = identity.version["config"]
    return Explanation(
        step.name,
        row.action.value if row is not None else "NONE",
        row.reason if row is not None else "it was not requested, and no step that this run executes needs it",
        identity.hash,
        path,
        dict(sorted(config.items())),
        tuple(user.name for user in order.steps if any(edge.step is step for edge in graph.edges[user])),
        {
            base_name(other): tuple(differences(old, config, graph.files[step]))
            for other, old in recorded.items()
            if old is not None
        },
    )
