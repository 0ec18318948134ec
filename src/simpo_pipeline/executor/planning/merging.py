"""Warnings about steps that have one identity, and therefore run once, although their configs are not the same."""

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any, cast

from simpo_pipeline.executor.planning.identity import field_below
from simpo_pipeline.executor.records.secrets import redact_json
from simpo_pipeline.executor.step import ContentOf, ExecutorStep, InputName, LiveInput, VersionedValue

_IN_IDENTITY = (VersionedValue, ExecutorStep, InputName, LiveInput, ContentOf)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_MAX_SHOWN = 3
_MAX_CHARACTERS = 60


def merge_warnings(
    canonical: Mapping[ExecutorStep[Any], ExecutorStep[Any]], files: Mapping[ExecutorStep[Any], Mapping[str, str]]
) -> Iterator[str]:
    """Yield a warning for each step whose function or config differs from that of the step that runs in its place.

    Args:
        canonical: Maps each step to the one of the same identity that runs.
        files: The files whose content is in the identity of each step, by field path. Equal files may have other paths.
    """
    for step, runs in canonical.items():
        found = list(_differences(runs, step, files[runs])) if step is not runs else []
        if found:
            more = f"; and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
            yield (
                f"Two steps named {step.name!r} have the same version, so only the first one runs. They differ in what "
                f"is not part of the version: {'; '.join(found[:_MAX_SHOWN])}{more}. If these are different steps, "
                "mark the values with versioned(...), or give the steps different names."
            )


def _differences(runs: ExecutorStep[Any], other: ExecutorStep[Any], files: Mapping[str, str]) -> Iterator[str]:
    ours, theirs = _leaves_of_step(runs), _leaves_of_step(other)
    for path in dict.fromkeys([*ours, *theirs]):
        one, another = ours.get(path, "absent"), theirs.get(path, "absent")
        if one != another and not any(at == path or at.startswith(f"{path}[") for at in files):
            yield f"{path}: {_shortened(path, one)} and {_shortened(path, another)}"


def _shortened(path: str, text: str) -> str:
    redacted: str = redact_json({path: text})[path]
    return redacted if len(redacted) <= _MAX_CHARACTERS else f"{redacted[: _MAX_CHARACTERS - 3]}..."


def _leaves_of_step(step: ExecutorStep[Any]) -> dict[str, str]:
    try:
        return dict([*_leaves(step.config, ""), *_leaves_of_function(step.fn, "fn")])
    except RecursionError:  # a value that a function was made with contains itself
        return {}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the field path and the text of each value that is not part of the identity."""
    if isinstance(value, _IN_IDENTITY):
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"type of {path or 'the config'}", type(value).__name__
        inner = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        inner = list(cast(dict[Any, Any], value).items())
    elif isinstance(value, list | tuple):
        inner = list(enumerate(cast(list[Any], value)))
    elif callable(value) and not isinstance(value, type):
        yield from _leaves_of_function(value, path)
        return
    else:
        yield path or "the config", _text(value)
        return
    for key, member in inner:
        yield from _leaves(member, field_below(path, key))


def _leaves_of_function(function: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the name of a function and the values that it was made with, which may differ between equal names."""
    if isinstance(function, functools.partial):
        partial = cast("functools.partial[Any]", function)
        yield from _leaves_of_function(partial.func, path)
        yield from _leaves([*partial.args, partial.keywords], path)
        return
    yield path, _text(function)
    code, owner = getattr(function, "__code__", None), getattr(function, "__self__", None)
    if code is None or owner is not None:  # a method, or an object that can be called
        members = getattr(function if owner is None else owner, "__dict__", {})
        yield from ((f"{path}.{name}", _text(value)) for name, value in dict(members).items())
    yield from _leaves(getattr(function, "__defaults__", None) or (), f"{path}.defaults")
    yield from _leaves(getattr(function, "__kwdefaults__", None) or {}, f"{path}.defaults")
    cells = getattr(function, "__closure__", None) or ()
    for variable, cell in zip(code.co_freevars if code else (), cells, strict=False):
        with contextlib.suppress(ValueError):  # the variable has no value yet
            yield f"{path}.{variable}", _text(cell.cell_contents)


def _text(value: Any) -> str:
    """Return the repr without addresses, which differ between equal objects. The repr of an array omits elements.

    Of a function, return its name and a digest of its code, because two lambdas may have one name.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if callable(value) and name:
        code = getattr(value, "__code__", None)
        return f"{module}.{name}" + (f" (code {_digest(_code_key(code))})" if isinstance(code, CodeType) else "")
    elements = _digest(cast(Any, value).tobytes()) if hasattr(value, "tobytes") else ""
    try:
        return f"{_ADDRESS.sub('', repr(value))}{elements}"
    except Exception as error:  # the comparison is only shown, so no plan depends on the repr of a foreign class
        return f"{type(value).__name__} ({type(error).__name__} in its repr)"


def _code_key(code: CodeType) -> bytes:
    constants = [_code_key(each) if isinstance(each, CodeType) else each for each in code.co_consts]
    return repr((code.co_code, code.co_names, constants)).encode(errors="backslashreplace")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]
