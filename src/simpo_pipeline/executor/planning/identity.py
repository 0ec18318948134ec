"""Step identity: the name, the versioned values and the identities of the dependencies. A new identity is a new step.

Nothing else is part of the identity: not the prefix, region, output path, host count, accelerator, location of the
code, values not marked `versioned`, or the order of fields or keys. The identity is a JSON text, named by its SHA-256.

    version(step) = sha256(name, {field path: versioned value | version(dependency) and how it is used})
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
from typing import Any, cast

from simpo_pipeline.errors import IdentityError
from simpo_pipeline.executor.step import ExecutorStep, InputName, LiveInput, OutputName, VersionedValue

_MARKERS = (VersionedValue, ExecutorStep, InputName, OutputName, LiveInput)
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


def find_markers(config: Any) -> Markers:
    """Return the versioned values and the edges of a config, by field path (`train.rates[0]`).

    Raises:
        IdentityError: A versioned value has no canonical form. The message names its field path.
    """
    versioned: dict[str, Any] = {}
    edges: list[Edge] = []
    for keys, marker in _locate_markers(config):
        path = _path_of(keys)
        match marker:
            case VersionedValue():
                versioned[path] = canonical(cast(Any, marker).value, path)
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
    return Markers(versioned, tuple(edges))


def _locate_markers(config: Any) -> list[tuple[tuple[Any, ...], Any]]:
    try:
        return list(_walk(config, ()))
    except RecursionError as error:
        raise IdentityError("A config contains itself or is nested too deeply. Flatten it.") from error


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
        path = _below(path, key)
    return path


def _below(path: str, key: Any) -> str:
    """Append a key to a field path. Keys that are not identifiers are quoted, so that every path is unique."""
    if isinstance(key, str):
        name = str.__str__(key)
        if not name.isidentifier():
            return f"{path}[{name!r}]"
        return f"{path}.{name}" if path else name
    shown = repr(key) if key is None or isinstance(key, bool | int | float) else _json(canonical(key, path))
    return f"{path}[{shown}]"


def canonical(value: Any, path: str) -> Any:
    """Convert the value to plain JSON that is the same for equal values, across processes and machines.

    Raises:
        IdentityError: The value has no such form. The message names `path` and what to do.
    """
    try:
        return _canonical(value, path)
    except RecursionError as error:
        raise IdentityError(
            f"The versioned value at {path or 'the config itself'!r} contains itself or is nested too deeply. "
            "Flatten it."
        ) from error


def _canonical(value: Any, path: str) -> Any:
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
        return _canonical_container(value, path)
    return {f"!{type(value).__name__}": _canonical_text(value, path)}


def _canonical_container(value: Any, path: str) -> Any:
    if isinstance(value, list | tuple):
        return [_canonical(inner, _below(path, index)) for index, inner in _children(value)]
    if isinstance(value, set | frozenset):
        members = [_canonical(member, f"{path}{{}}") for member in cast(frozenset[Any], value)]
        return {"!set": sorted(members, key=_json)}
    if isinstance(value, dict):
        return _canonical_dict(cast(dict[Any, Any], value), path)
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {"!dataclass": type(value).__name__, **_canonical_dict(fields, path)}


def _canonical_dict(value: Mapping[Any, Any], path: str) -> dict[str, Any]:
    for key in value:
        if not isinstance(key, str):
            raise _no_form(key, path, "dict keys must be str. Convert the keys to str.")
    return {
        f"!{key}" if key.startswith("!") else key: _canonical(value[key], _below(path, key)) for key in sorted(value)
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
