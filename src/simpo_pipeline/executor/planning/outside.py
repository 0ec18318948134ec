"""Files that no step wrote, but that a config refers to, with the checksums of their content.

A config refers to them with `content_of`, or by a path in a field that is declared with `outside_path`, also within a
versioned value. Of all planning, only this module and the planner read storage.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from simpo_pipeline.errors import IdentityError
from simpo_pipeline.executor.step import (
    OUTSIDE_FILES,
    ContentOf,
    ExecutorStep,
    InputName,
    LiveInput,
    OutputName,
    VersionedValue,
)
from simpo_pipeline.storage.content import content_checksums
from simpo_pipeline.storage.paths import base_name

Content = str | Mapping[str, str]
"""The checksum of a file, or the checksums of several files by name."""
_OTHER_MARKERS = (ExecutorStep, InputName, OutputName, LiveInput)


@dataclass(frozen=True)
class OutsideFiles:
    """One reference to files that exist."""

    keys: tuple[Any, ...]
    """Field names, keys and indices that lead to the reference."""
    path: str
    """Path of the file, or of the folder of the files."""
    content: Content
    is_versioned_above: bool
    """Whether it is part of a larger versioned value."""


@dataclass(frozen=True)
class _Reference:
    keys: tuple[Any, ...]
    files: Callable[[], Sequence[str]]
    names: Sequence[str] | None
    """As in `outside_path`. None for `content_of`."""
    is_versioned_above: bool


def find_outside(config: Any) -> Iterator[OutsideFiles]:
    """Yield the references of a config to files that exist, with the checksums of the files.

    Raises:
        ConfigError: A path can be no path, such as a URL that lost a slash.
        IdentityError: A set contains a reference.
        StorageError: A file cannot be read.
    """
    for reference in _walk(config, (), False):
        paths = list(reference.files())
        if len(paths) == 1:
            content = content_checksums(paths[0], reference.names or ())
            if content is not None:
                if isinstance(content, str) and reference.names is not None:
                    content += _ending(paths[0])
                yield OutsideFiles(reference.keys, paths[0], content, reference.is_versioned_above)
            continue
        folder = os.path.commonprefix(paths).rpartition("/")[0]  # noqa: RUF071 - commonpath would not keep URLs
        contents = {path[len(folder) :].lstrip("/"): content_checksums(path) for path in paths}
        whole = {name: content for name, content in contents.items() if isinstance(content, str)}
        if whole and len(whole) == len(paths):
            yield OutsideFiles(reference.keys, folder, whole, reference.is_versioned_above)


def _ending(path: str) -> str:
    """Return the part of a file's name that says how it is read, such as `.jsonl.gz`."""
    stem, last = os.path.splitext(base_name(path))
    return os.path.splitext(stem)[1] + last if last == ".gz" else last


def _walk(value: Any, keys: tuple[Any, ...], versioned: bool) -> Iterator[_Reference]:
    if isinstance(value, ContentOf):
        yield _Reference(keys, value.files, None, versioned)
    elif isinstance(value, VersionedValue):
        yield from _walk(cast(Any, value).value, keys, True)
    elif isinstance(value, _OTHER_MARKERS):
        return
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            inner, inner_keys = getattr(value, field.name), (*keys, field.name)
            path = inner.value if isinstance(inner, VersionedValue) else inner
            if OUTSIDE_FILES in field.metadata and isinstance(path, str | os.PathLike):
                only = [os.fspath(cast("str | os.PathLike[str]", path))]
                yield _Reference(inner_keys, lambda only=only: only, field.metadata[OUTSIDE_FILES], versioned)
            else:
                yield from _walk(inner, inner_keys, versioned)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(cast(list[Any], value)):
            yield from _walk(inner, (*keys, index), versioned)
    elif isinstance(value, dict):
        for key, inner in cast(dict[Any, Any], value).items():
            yield from _walk(inner, (*keys, key), versioned)
    elif isinstance(value, set | frozenset):
        for inner in cast(set[Any], value):
            if next(_walk(inner, keys, versioned), None) is not None:
                raise IdentityError(
                    f"A set contains {inner!r}, which refers to files that no step wrote. Their content is part of the "
                    "version, and the members of a set have no order. Use a list."
                )
