"""Resolution of markers in configs: the config that a step function reads, and its JSON form in the records."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

from simpo_pipeline.executor.planning.graph import Step
from simpo_pipeline.executor.step import ContentOf, ExecutorStep, InputName, LiveInput, OutputName, VersionedValue
from simpo_pipeline.storage.paths import is_relative, join


@dataclass(frozen=True)
class Resolver:
    """Replaces the markers in one step's config with their values."""

    prefix: str
    output_path: str
    """Output path of this step."""
    output_paths: Mapping[Step, str]
    """Output paths of all steps that the config may refer to."""
    live_value: Callable[[LiveInput], Any]

    def resolve(self, value: Any) -> Any:
        """Return the value with all its markers replaced. A value without markers is returned as the same object."""
        match value:
            case VersionedValue():
                return value.value
            case ContentOf():
                return value.path
            case ExecutorStep():
                return self.output_paths[cast(Step, value)]
            case InputName():
                return self._input_path(value)
            case OutputName():
                return join(self.output_path, value.name or "")
            case LiveInput():
                return self.live_value(value)
            case _:
                return self._resolve_container(value)

    def _input_path(self, value: InputName) -> str:
        if value.step is not None:
            return join(self.output_paths[value.step], value.name or "")
        path = value.name or ""
        return join(self.prefix, path) if is_relative(path) else path

    def _resolve_container(self, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
            new = {name: self.resolve(inner) for name, inner in old.items()}
            changed = {name: inner for name, inner in new.items() if inner is not old[name]}
            return dataclasses.replace(value, **changed) if changed else value
        if isinstance(value, dict):
            entries = cast(dict[Any, Any], value)
            return _same_unless_changed(entries, {key: self.resolve(inner) for key, inner in entries.items()})
        if isinstance(value, list | tuple):
            members = cast(list[Any], value)
            resolved = [self.resolve(inner) for inner in members]
            if all(new is old for new, old in zip(resolved, members, strict=True)):
                return members
            return _rebuilt(members, resolved)
        return value


def _same_unless_changed(old: dict[Any, Any], new: dict[Any, Any]) -> dict[Any, Any]:
    return old if all(new[key] is old[key] for key in old) else new


def _rebuilt(sequence: object, members: list[Any]) -> Any:
    kind: Any = type(sequence)
    return kind(*members) if hasattr(sequence, "_fields") else kind(members)


def to_json(value: Any) -> Any:
    """Convert the value to JSON for people to read. The conversion is not reversible and never raises."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case LiveInput():
            return {value.use.value: value.step.name}
        case PurePath():
            return value.as_posix()
        case list() | tuple() | set() | frozenset():
            return [to_json(inner) for inner in cast(list[Any], value)]
        case dict():
            return {str(key): to_json(inner) for key, inner in cast(dict[Any, Any], value).items()}
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        case _:
            return repr(value)


def json_text(value: Any) -> str:
    """Return the canonical text of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
