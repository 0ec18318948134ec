"""Resolution of a preference source (a path, a pattern, or one split of a hub dataset) to its files.

Lists names through the storage package. Does not open the files.

A path that exists is that path, whatever characters its name has. It is a pattern only if nothing of that name exists.
The same holds for its folders: in `run[1]/*.jsonl`, `run[1]` is the folder of that name if there is one, and then no
other folder is read.
"""

import re
from fnmatch import filter as filter_names
from pathlib import PurePosixPath

from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.errors import DataError, StorageError
from simpo_pipeline.storage.files import exists, list_files, list_names
from simpo_pipeline.storage.paths import join

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
"""Endings of the names of files that contain rows."""

_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def source_files(source: PreferenceSource) -> list[str]:
    """Return the files of `source`, sorted by name.

    Raises:
        DataError: no file matches, one is neither JSON nor Parquet, or the split exists in several configurations.
        StorageError: a folder cannot be listed.
    """
    if source.split is not None:
        return _hub_split_files(source.path, source.split, source.revision)
    is_pattern = _GLOB_CHARACTERS.search(source.path) and not exists(source.path)
    paths = _matching_files(source.path) if is_pattern else [source.path]
    for path in paths:
        if not path.endswith(ROW_SUFFIXES):
            raise DataError(
                f"{path}: expected a file ending in {', '.join(ROW_SUFFIXES[:-1])} or {ROW_SUFFIXES[-1]}; for a hub "
                f"dataset, also give its split"
            )
    return paths


def _matching_files(pattern: str) -> list[str]:
    start, relative_pattern = _split_pattern(pattern)
    *folder_patterns, name_pattern = (part for part in relative_pattern.split("/") if part not in ("", "."))
    folders = [start or "/"]
    for folder_pattern in folder_patterns:
        folders = [join(folder, name) for folder in folders for name in filter_names(_names(folder), folder_pattern)]
    paths = sorted(join(folder, name) for folder in folders for name in _matching_names(folder, name_pattern))
    if not paths:
        raise DataError(
            f"no file matches {pattern!r}: nothing has that name, and nothing in {start or '/'!r} matches the pattern "
            f"{relative_pattern!r}; check the path (*, ? and [...] match within one folder level)"
        )
    return paths


def _matching_names(folder: str, pattern: str) -> list[str]:
    """Return the names that match, without those of folders.

    A folder, a pipe or a broken link with the name of a file of rows is not left out: reading it is refused.
    """
    files = {entry.relative_path for entry in list_files(folder)}
    return [name for name in filter_names(_names(folder), pattern) if name in files or name.endswith(ROW_SUFFIXES)]


def _names(folder: str) -> list[str]:
    """Return the names in a folder; none if it is a file, whose name only happens to match the pattern of a folder."""
    try:
        return list_names(folder)
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return []
        raise


def _split_pattern(pattern: str) -> tuple[str, str]:
    """Return the folder that a pattern starts from, and the pattern of the paths below it.

    Folders at its beginning that exist under their literal names belong to the first part.
    """
    first_glob = _GLOB_CHARACTERS.search(pattern)
    assert first_glob is not None
    folder, _, _ = pattern[: first_glob.start()].rpartition("/")
    rest = pattern[len(folder) + 1 :] if folder or pattern.startswith("/") else pattern
    while "/" in rest:
        name, _, below = rest.partition("/")
        literal = pattern[: len(pattern) - len(below) - 1]
        if not name or (_GLOB_CHARACTERS.search(name) and not exists(literal)):
            break
        folder, rest = literal, below
    return (folder if folder or pattern.startswith("/") else "."), rest


def _hub_split_files(dataset: str, split: str, revision: str | None) -> list[str]:
    if not _HUB_ID.fullmatch(dataset):
        raise DataError(f"{dataset!r} with split {split!r}: expected a hub dataset id like owner/name")
    root = f"hf://datasets/{dataset}" + (f"@{revision}" if revision else "")
    found = [PurePosixPath(entry.relative_path) for entry in list_files(root)]
    paths = [path for path in found if path.suffix == ".parquet" and _is_of_split(path, split)]
    if not paths:
        raise DataError(
            f"{root} has no Parquet file of split {split!r} (found {len(found)} files); check the split's name, or set "
            f"revision to 'refs/convert/parquet', where the hub keeps a Parquet copy of most datasets"
        )
    folders = sorted({_configuration_of(path, split) for path in paths})
    if len(folders) > 1:
        raise DataError(
            f"{root} has split {split!r} in several configurations: {', '.join(folders)}; choose one by setting "
            f"path to its files, without split: {root}/{folders[0]}/..."
        )
    return sorted(join(root, str(path)) for path in paths)


def _is_of_split(path: PurePosixPath, split: str) -> bool:
    """Return whether a file belongs to a split, by the hub's naming.

    The hub uses `data/train-00000-of-00001.parquet`, `train.parquet` or `default/train/0000.parquet`.
    """
    return path.stem == split or path.name.startswith(f"{split}-") or path.parent.name == split


def _configuration_of(path: PurePosixPath, split: str) -> str:
    return str(path.parent.parent if path.parent.name == split else path.parent)
