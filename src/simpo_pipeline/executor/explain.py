"""Why is a step new? Compares its identity with those that steps of the same name left beside it."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from simpo_pipeline.errors import StorageError
from simpo_pipeline.executor.identity import SHORT_HASH_LENGTH
from simpo_pipeline.executor.info import read_info
from simpo_pipeline.storage.paths import base_name

_MAX_SIBLINGS = 20
_MAX_SHOWN = 3
_MAX_VALUE_CHARACTERS = 60


def siblings_by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that look like output paths, by what comes before their hash; only some where there are many."""
    stems: dict[str, list[str]] = {}
    for name in names:
        suffix = name.rpartition("-")[2]
        if len(suffix) == SHORT_HASH_LENGTH and all(character in "0123456789abcdef" for character in suffix):
            siblings = stems.setdefault(stem_of(name), [])
            if len(siblings) < _MAX_SIBLINGS:
                siblings.append(name)
    return stems


def stem_of(output_path: str) -> str:
    """The last part of an output path without its hash."""
    return base_name(output_path).rpartition("-")[0]


def recorded_config(output_path: str) -> dict[str, Any] | None:
    """The versioned values and dependencies recorded at an output path; None when there is no record to believe."""
    try:
        version = read_info(output_path).get("version")
    except StorageError:
        return None
    config = cast(dict[str, Any], version).get("config") if isinstance(version, dict) else None
    return cast(dict[str, Any], config) if isinstance(config, dict) else None


def what_changed(config: Mapping[str, Any], siblings: Mapping[str, Mapping[str, Any]]) -> str | None:
    """How a step's versioned config differs from the most similar of its siblings'; None when there is none."""
    nearest: tuple[str, list[str]] | None = None
    for sibling, old in siblings.items():
        differences = _differences(old, config)
        if differences and (nearest is None or len(differences) < len(nearest[1])):
            nearest = (sibling, differences)
    if nearest is None:
        return None
    sibling, differences = nearest
    more = f"; and {len(differences) - _MAX_SHOWN} more" if len(differences) > _MAX_SHOWN else ""
    return f"new since {sibling}: {'; '.join(differences[:_MAX_SHOWN])}{more}"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    absent = object()
    found: list[str] = []
    for path in sorted({*old, *new}):
        before, after = old.get(path, absent), new.get(path, absent)
        if before != after:
            shown = ("absent" if value is absent else _shown(value) for value in (before, after))
            found.append(f"{path}: {' -> '.join(shown)}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "!step" in value:
        use = cast(dict[str, Any], value)
        label = str(use["!step"])
        name, _, identity = label.rpartition("-")
        kind = "" if use.get("use") == "saved" else f" ({use.get('use')})"
        below = f"/{use['sub_path']}" if use.get("sub_path") else ""
        return f"{name}-{identity[:SHORT_HASH_LENGTH]}{below}{kind}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[: _MAX_VALUE_CHARACTERS - 3]}..."
