"""Check of raw values against a dataclass, key by key, with one sentence for each value that does not fit.

Supports fields that are dataclasses, `X | None`, `Literal`, `dict[str, X]`, lists, tuples of one type, and scalars.
Nothing is converted: a number in quotes is text. This module does not know files or the meaning of a setting.

A dataclass may have a class attribute `RETIRED`, which maps a key that it no longer has to what to do instead.
"""

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union

_SCALARS: Mapping[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
}


@dataclasses.dataclass(frozen=True)
class _Checker:
    source: str
    root: type
    page: str | None

    def value(self, kind: Any, raw: Any, key: str) -> Iterator[str]:
        """Yield sentences about `raw` under `key`."""
        origin = typing.get_origin(kind)
        arguments = typing.get_args(kind)
        if kind is Any:
            return
        if origin in (Union, types.UnionType):
            yield from self._union(arguments, raw, key)
        elif dataclasses.is_dataclass(kind):
            yield from self._dataclass(typing.cast(type, kind), raw, key)
        elif origin is dict and isinstance(raw, dict):
            for name, inner in raw.items():
                if not isinstance(name, str):
                    yield f"{self.source}: {key} has the key {_show(name)}, which is not text; put it in quotes."
                yield from self.value(arguments[1], inner, _below(key, name))
        elif origin in (list, tuple) and isinstance(raw, list):
            for index, inner in enumerate(raw):
                yield from self.value(arguments[0], inner, f"{key}[{index}]")
        elif not fits(kind, raw):
            yield f"{self.source}: {key} is {_show(raw)}; expected {_describe(kind)}{_advice((kind,), raw)}."

    def _union(self, kinds: tuple[Any, ...], raw: Any, key: str) -> Iterator[str]:
        if raw is None and type(None) in kinds:
            return
        answers = [list(self.value(kind, raw, key)) for kind in kinds if kind is not type(None)]
        if not all(answers):
            return
        if len(answers) == 1 and isinstance(raw, list | dict):
            # The value itself has the right type; the misfit is inside it.
            yield from answers[0]
        else:
            expected = " or ".join(map(_describe, kinds)) + _advice(kinds, raw)
            yield f"{self.source}: {key} is {_show(raw)}; expected {expected}."

    def _dataclass(self, kind: type, raw: Any, key: str) -> Iterator[str]:
        if not isinstance(raw, dict):
            yield f"{self.source}: {key} is {_show(raw)}; expected a mapping with keys {', '.join(_hints(kind))}."
            return
        hints, retired = _hints(kind), getattr(kind, "RETIRED", {})
        for name, inner in raw.items():
            inner_key = _below(key, name)
            if name in hints:
                yield from self.value(hints[name], inner, inner_key)
            elif name in retired:
                yield f"{self.source}: {inner_key} is retired: {retired[name]}."
            else:
                page = "" if self.page is None else f"; see {self.page}"
                yield f"{self.source}: {inner_key} is not a setting; {self._nearest(str(name), key, hints)}{page}."

    def _nearest(self, name: str, key: str, hints: Mapping[str, Any]) -> str:
        elsewhere = [path for path in _all_keys(self.root) if path.rpartition(".")[2] == name]
        near = [_below(key, match) for match in difflib.get_close_matches(name, hints, n=1)]
        if elsewhere or near:
            return f"the nearest is {(elsewhere + near)[0]}"
        return f"the settings {f'of {key}' if key else 'here'} are {', '.join(hints)}"


def find_type_errors(kind: type, raw: Mapping[str, Any], source: str, page: str | None) -> list[str]:
    """Return one sentence for each key of `raw` that is unknown, retired or of the wrong type; keys may be missing.

    Args:
        kind: The dataclass that `raw` is meant for.
        raw: The content of a YAML file.
        source: The file, or "command line"; each sentence begins with it.
        page: The page on the settings; sentences about unknown keys refer to it.
    """
    return list(_Checker(source, kind, page).value(kind, dict(raw), ""))


def find_missing(kind: type, raw: Mapping[str, Any], source: str, key: str = "") -> list[str]:
    """Return one sentence for each required field that is missing from `raw`, which fits otherwise."""
    missing: list[str] = []
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        inner_key = _below(key, field.name)
        if field.name in raw:
            missing += _missing_below(hints[field.name], raw[field.name], source, inner_key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            missing.append(f"{source}: {inner_key} is missing; give {_describe(hints[field.name])}.")
    return missing


def _missing_below(kind: Any, raw: Any, source: str, key: str) -> list[str]:
    if dataclasses.is_dataclass(kind) and isinstance(raw, Mapping):
        return find_missing(typing.cast(type, kind), raw, source, key)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (Union, types.UnionType):
        return [sentence for inner in arguments for sentence in _missing_below(inner, raw, source, key)]
    if typing.get_origin(kind) is dict and isinstance(raw, Mapping):
        found = [_missing_below(arguments[1], inner, source, _below(key, name)) for name, inner in raw.items()]
        return [sentence for sentences in found for sentence in sentences]
    return []


def fits(kind: Any, raw: Any) -> bool:
    """Return whether a value is of a scalar type, or one of the values of a `Literal`."""
    if typing.get_origin(kind) is Literal:
        return any(raw == allowed and type(raw) is type(allowed) for allowed in typing.get_args(kind))
    if kind not in _SCALARS:
        return False
    if kind is float and isinstance(raw, int | float) and not _is_number(raw):
        return False
    # bool is a subclass of int, but it is not a number.
    return isinstance(raw, _SCALARS[kind][0]) and (kind is bool or not isinstance(raw, bool))


def _is_number(raw: int | float) -> bool:
    """Return whether a value is a float or becomes one. NaN is not a number, and larger integers are no floats."""
    return raw in (math.inf, -math.inf) or abs(raw) <= sys.float_info.max


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind][1]
    if kind is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(str(allowed) for allowed in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(inner) for inner in arguments)
    if origin in (list, tuple):
        return f"a list, each entry {_describe(arguments[0])}"
    return "a mapping"


def _advice(kinds: Sequence[Any], raw: Any) -> str:
    """Return what to do about a number or a truth value if it may have been meant as text: `010` is shown as 10."""
    return "; put text in quotes" if str in kinds and isinstance(raw, int | float) else ""


def _show(raw: Any) -> str:
    text = "null" if raw is None else repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."


def _hints(kind: type) -> dict[str, Any]:
    return {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}


def _below(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _all_keys(kind: type, key: str = "") -> Iterator[str]:
    for name, hint in _hints(kind).items():
        yield _below(key, name)
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(typing.cast(type, hint), _below(key, name))
