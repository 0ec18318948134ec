"""Resolution of a preference source (a path, a glob, or one split of a hub dataset) to its files.

Lists names through the storage package. Does not open the files.
"""

import re
from pathlib import PurePosixPath

from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.errors import DataError
from simpo_pipeline.storage.files import list_files
from simpo_pipeline.storage.paths import join

_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = (".jsonl", ".parquet")


def source_files(source: PreferenceSource) -> list[str]:
    """Return the files of `source`, sorted by name.

    Raises:
        DataError: no file matches, one is neither JSONL nor Parquet, or the split exists in several configurations.
    """
    if source.split is not None:
        return _hub_split_files(source.path, source.split, source.revision)
    paths = _matching_files(source.path) if _GLOB_CHARACTERS.search(source.path) else [source.path]
    if not paths:
        raise DataError(f"no file matches {source.path!r}; check the pattern (* matches within one folder level)")
    for path in paths:
        if not path.endswith(_SUFFIXES):
            raise DataError(
                f"{path}: expected a file ending in {' or '.join(_SUFFIXES)}; for a hub dataset, also give its split"
            )
    return paths


def _matching_files(pattern: str) -> list[str]:
    first_glob = _GLOB_CHARACTERS.search(pattern)
    assert first_glob is not None
    folder, _, _ = pattern[: first_glob.start()].rpartition("/")
    if not folder and not pattern.startswith("/"):
        folder, relative_pattern = ".", pattern
    else:
        relative_pattern = pattern[len(folder) + 1 :]
    # The leading slashes anchor the pattern, so it must match the whole relative path.
    return [
        join(folder or "/", entry.relative_path)
        for entry in list_files(folder or "/")
        if PurePosixPath("/" + entry.relative_path).match("/" + relative_pattern)
    ]


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
