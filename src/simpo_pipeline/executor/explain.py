"""Why is a step new? Compares its identity with those that steps of the same name left in the prefix."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from simpo_pipeline.errors import StorageError
from simpo_pipeline.executor.identity import SHORT_HASH_LENGTH
from simpo_pipeline.executor.info import read_info
from simpo_pipeline.storage.paths import base_name, join, parent

_MAX_SIBLINGS = 20
_MAX_SHOWN = 3
_MAX_VALUE_CHARACTERS = 60


def versions_by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of a folder that look like output paths, by what comes before their hash."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stem, suffix = _split(name)
        if len(suffix) == SHORT_HASH_LENGTH and all(character in "0123456789abcdef" for character in suffix):
            stems.setdefault(stem, []).append(name)
    return stems


def _split(name: str) -> tuple[str, str]:
    stem, _, suffix = name.rpartition("-")
    return stem, suffix


def what_changed(version: Mapping[str, Any], output_path: str, stems: Mapping[str, list[str]]) -> str | None:
    """How a step differs from the most similar step of its name beside it; None when there is none.

    `stems` are the names in the folder that holds `output_path`, from `versions_by_stem`.
    """
    own_name = base_name(output_path)
    siblings = [name for name in stems.get(_split(own_name)[0], []) if name != own_name]
    nearest: tuple[int, str, list[str]] | None = None
    for sibling in siblings[:_MAX_SIBLINGS]:
        differences = _differences_from(join(parent(output_path), sibling), version)
        if differences and (nearest is None or len(differences) < nearest[0]):
            nearest = (len(differences), sibling, differences)
    if nearest is None:
        return None
    count, sibling, differences = nearest
    more = f"; and {count - _MAX_SHOWN} more" if count > _MAX_SHOWN else ""
    return f"new since {sibling}: {'; '.join(differences[:_MAX_SHOWN])}{more}"


def _differences_from(output_path: str, version: Mapping[str, Any]) -> list[str]:
    """The differences to the step recorded at an output path; empty when its record cannot be read."""
    try:
        recorded = read_info(output_path).get("version")
    except StorageError:
        return []
    if not isinstance(recorded, dict):
        return []
    old = cast(dict[str, Any], recorded).get("config")
    return _differences(cast(dict[str, Any], old), version["config"]) if isinstance(old, dict) else []


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
