"""Step identity: the name, the versioned values and the identities of the dependencies. A new identity is a new step.

Files that no step wrote are identified by the checksums of their content, not by their paths.

Nothing else is part of the identity: not the prefix, region, output path, host count, accelerator, location of the
code, values not marked `versioned`, or the order of fields or keys. The identity is a JSON text, named by its SHA-256.

    version(step) = sha256(name, {field path: versioned value | checksum | version(dependency) and how it is used})
"""

import dataclasses
import hashlib
import json
import numbers
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from enum import Enum, StrEnum
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, cast

from simpo_pipeline.errors import IdentityError
from simpo_pipeline.executor.planning.outside import Content, OutsideFiles, find_outside
from simpo_pipeline.executor.step import (
    ADDED_LATER,
    ContentOf,
    ExecutorStep,
    InputName,
    LiveInput,
    OutputName,
    VersionedValue,
)
from simpo_pipeline.storage.paths import join

_MARKERS = (VersionedValue, ExecutorStep, InputName, OutputName, LiveInput, ContentOf)
_NO_CONTENTS: Mapping[str, Content] = MappingProxyType({})
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
SHORT_HASH_LENGTH = 8


class EdgeKind(StrEnum):
    """Kind of use that one step makes of another."""

    SAVED = "saved"
    PSEUDO = "pseudo"
    BORROW = "borrow"
    TAKE = "take"


@dataclass(frozen=True)
class Edge:
    """One use of another step, at one field path of a config."""

    step: ExecutorStep[Any]
    kind: EdgeKind
    field_path: str
    sub_path: str | None = None


@dataclass(frozen=True)
class Markers:
    """The versioned values and the edges of a config."""

    versioned: Mapping[str, Any]
    """Canonical values by field path."""
    edges: tuple[Edge, ...]
    files: Mapping[str, str]
    """The files whose content is among the versioned values, by field path."""


def find_markers(config: Any) -> Markers:
    """Return the versioned values and the edges of a config, by field path (`train.rates[0]`).

    Raises:
        IdentityError: A versioned value has no canonical form. The message names its field path.
        StorageError: A file that no step wrote cannot be read.
    """
    versioned: dict[str, Any] = {}
    edges: list[Edge] = []
    files: dict[str, str] = {}
    markers = _locate_markers(config)
    contents: dict[str, Content] = {}
    for outside in _locate_outside(config, markers):
        path = _path_of(outside.keys)
        contents[path] = outside.content
        files |= _file_paths(outside, path)
        if not outside.is_versioned_above:
            versioned |= _content_values(outside.content, path)
    for keys, marker in markers:
        path = _path_of(keys)
        match marker:
            case VersionedValue() | ContentOf() if path in contents:
                pass  # identified by content
            case VersionedValue():
                versioned[path] = canonical(cast(Any, marker).value, path, contents)
            case ContentOf():
                versioned[path] = marker.path
            case InputName(step=None):
                versioned[path] = marker.name
            case ExecutorStep():
                edges.append(Edge(cast(ExecutorStep[Any], marker), EdgeKind.SAVED, path))
            case InputName(step=ExecutorStep()):
                kind = EdgeKind.SAVED if marker.block_on_step else EdgeKind.PSEUDO
                edges.append(Edge(cast(ExecutorStep[Any], marker.step), kind, path, marker.name))
            case LiveInput():
                edges.append(Edge(marker.step, EdgeKind(marker.use.value), path))
            case OutputName():
                pass  # where a step writes is a consequence of its identity, not a part of it
            case _:
                raise AssertionError(f"unhandled marker {marker!r}")
    return Markers(versioned, tuple(edges), files)


def changed_files(config: Any, identified: Mapping[str, Any], files: Mapping[str, str]) -> list[str]:
    """Return the files that no step wrote and that changed after the identity of their step was computed.

    Args:
        config: The config of the step.
        identified: The values in the identity, by field path.
        files: The files that the identity covers, by field path.
    """
    now = find_markers(config)
    return [
        file
        for path, file in {**files, **now.files}.items()
        # As JSON, because a NaN beside a path is not equal to itself.
        if _json(_value_with(path, identified)) != _json(_value_with(path, now.versioned))
    ]


def _value_with(path: str, values: Mapping[str, Any]) -> Any:
    """Return the value at a field path, or the one that contains it."""
    return next((value for at, value in values.items() if path == at or path.startswith((f"{at}.", f"{at}["))), None)


def _content_values(content: Content, path: str) -> dict[str, Any]:
    """Return the versioned values of outside files. Each file of a folder is a value, so that plans can name it."""
    if isinstance(content, str) or not content:
        return {path: content}
    return {field_below(path, name): checksum for name, checksum in content.items()}


def _file_paths(outside: OutsideFiles, path: str) -> dict[str, str]:
    if isinstance(outside.content, str):
        return {path: outside.path}
    return {field_below(path, name): join(outside.path, name) for name in outside.content}


def _locate_markers(config: Any) -> list[tuple[tuple[Any, ...], Any]]:
    try:
        return list(_walk(config, ()))
    except RecursionError as error:
        raise IdentityError("A config contains itself or is nested too deeply. Flatten it.") from error


def _locate_outside(config: Any, markers: list[tuple[tuple[Any, ...], Any]]) -> list[OutsideFiles]:
    try:
        return list(find_outside(config))
    except RecursionError as error:
        for keys, marker in markers:
            if isinstance(marker, VersionedValue):
                canonical(cast(Any, marker).value, _path_of(keys))  # raises an error that names the field
        raise IdentityError("A versioned value contains itself or is nested too deeply. Flatten it.") from error


def _walk(value: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield each marker with the field names, keys and indices that lead to it. Other keys need no canonical form."""
    if isinstance(value, _MARKERS):
        yield keys, value
        return
    if isinstance(value, set | frozenset | dict) and any(isinstance(key, _MARKERS) for key in cast(set[Any], value)):
        where = _path_of(keys) or "the config itself"
        raise IdentityError(
            f"A set or the keys of a dict at {where!r} contain a step or a marker. Use a list, or values of the dict."
        )
    for key, inner in _children(value):
        yield from _walk(inner, (*keys, key))


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield field.name, getattr(value, field.name)
    elif isinstance(value, list | tuple):
        yield from enumerate(cast(list[Any], value))
    elif isinstance(value, dict):
        yield from cast(dict[Any, Any], value).items()


def _path_of(keys: tuple[Any, ...]) -> str:
    path = ""
    for key in keys:
        path = field_below(path, key)
    return path


def field_below(path: str, key: Any) -> str:
    """Append a key to a field path. Keys that are not identifiers are quoted, so that every path is unique."""
    if isinstance(key, str):
        name = str.__str__(key)
        if not name.isidentifier():
            return f"{path}[{name!r}]"
        return f"{path}.{name}" if path else name
    shown = repr(key) if key is None or isinstance(key, bool | int | float) else _json(canonical(key, path))
    return f"{path}[{shown}]"


def canonical(value: Any, path: str, contents: Mapping[str, Content] = _NO_CONTENTS) -> Any:
    """Convert the value to plain JSON that is the same for equal values, across processes and machines.

    Args:
        value: The value.
        path: Its field path.
        contents: Checksums that stand for the values at some field paths.

    Raises:
        IdentityError: The value has no such form. The message names `path` and what to do.
    """
    try:
        return _canonical(value, path, contents)
    except RecursionError as error:
        raise IdentityError(
            f"The versioned value at {path or 'the config itself'!r} contains itself or is nested too deeply. "
            "Flatten it."
        ) from error


def _canonical(value: Any, path: str, contents: Mapping[str, Content]) -> Any:
    if path in contents:
        return {"!content": contents[path]}
    if isinstance(value, _MARKERS):
        raise _no_form(value, path, "versioned(...) must not contain steps, paths of steps or other markers.")
    if isinstance(value, Enum):
        return {"!enum": f"{type(value).__name__}.{value.name}"}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        return float(value)
    if isinstance(value, type):
        return {"!class": value.__name__}
    if isinstance(value, list | tuple | set | frozenset | dict) or dataclasses.is_dataclass(value):
        return _canonical_container(value, path, contents)
    return {f"!{type(value).__name__}": _canonical_text(value, path)}


def _canonical_container(value: Any, path: str, contents: Mapping[str, Content]) -> Any:
    if isinstance(value, list | tuple):
        return [_canonical(inner, field_below(path, index), contents) for index, inner in _children(value)]
    if isinstance(value, set | frozenset):
        members = [_canonical(member, f"{path}{{}}", contents) for member in cast(frozenset[Any], value)]
        return {"!set": sorted(members, key=_json)}
    if isinstance(value, dict):
        return _canonical_dict(cast(dict[Any, Any], value), path, contents)
    fields = {
        field.name: inner
        for field in dataclasses.fields(value)
        for inner in [getattr(value, field.name)]
        if not (ADDED_LATER in field.metadata and inner == field.default)
    }
    return {"!dataclass": type(value).__name__, **_canonical_dict(fields, path, contents)}


def _canonical_dict(value: Mapping[Any, Any], path: str, contents: Mapping[str, Content]) -> dict[str, Any]:
    for key in value:
        if not isinstance(key, str):
            raise _no_form(key, path, "dict keys must be str. Convert the keys to str.")
    return {
        f"!{key}" if key.startswith("!") else key: _canonical(value[key], field_below(path, key), contents)
        for key in sorted(value)
    }


def _canonical_text(value: Any, path: str) -> str:
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, re.Pattern):
        return repr((cast(Any, value).pattern, cast(Any, value).flags))  # its own repr is cut off after 200 characters
    if isinstance(value, timedelta):
        return repr(value.total_seconds())
    if hasattr(value, "__array__") and getattr(value, "shape", ()) != ():
        raise _no_form(value, path, "the repr of an array may omit elements. Pass value.tolist() or a path.")
    text = repr(value)
    if callable(value) or _ADDRESS.search(text):
        raise _no_form(value, path, "functions and objects that define no repr differ between processes. Pass a name.")
    return text


def _no_form(value: Any, path: str, cure: str) -> IdentityError:
    where = path or "the config itself"
    return IdentityError(f"The versioned value at {where!r} contains {value!r} ({type(value).__name__}): {cure}")


@dataclass(frozen=True)
class Identity:
    """The identity of a step. Two steps with the same identity are the same step."""

    version: Mapping[str, Any]
    """The keys are name, config (field path to canonical value or dependency), dependencies and pseudo_dependencies."""
    version_str: str
    hash: str
    """SHA-256 of `version_str`, 64 hex digits."""

    @property
    def short_hash(self) -> str:
        """The part of the hash that the output path shows."""
        return self.hash[:SHORT_HASH_LENGTH]


def identify(name: str, markers: Markers, identities: Mapping[ExecutorStep[Any], Identity]) -> Identity:
    """Return the identity of a step, given its markers and the identities of all steps they refer to."""
    config = dict(markers.versioned)
    used: dict[bool, set[str]] = {True: set(), False: set()}
    for edge in markers.edges:
        label = f"{edge.step.name}-{identities[edge.step].hash}"
        config[edge.field_path] = {"!step": label, "use": edge.kind.value, "sub_path": edge.sub_path}
        used[edge.kind is EdgeKind.PSEUDO].add(label)
    version = {
        "name": name,
        "config": config,
        "dependencies": sorted(used[False]),
        "pseudo_dependencies": sorted(used[True]),
    }
    version_str = _version_str(name, version)
    return Identity(version, version_str, hashlib.sha256(version_str.encode("ascii")).hexdigest())


def _version_str(name: str, version: Mapping[str, Any]) -> str:
    try:
        json.dumps(version, ensure_ascii=False).encode()  # the form in which the records store it
        return _json(version)
    except ValueError as error:
        raise IdentityError(
            f"The identity of step {name!r} cannot be written as JSON: {error}. Shorten the number or correct the text."
        ) from error


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
