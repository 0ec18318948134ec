"""Conditional writes on a local folder, in memory and on a Google Cloud Storage server over HTTP."""

import errno
import os
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.storage import local_versions
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.files import exists, list_files, read_bytes, write_bytes
from simpo_pipeline.storage.paths import join

FILES = ConditionalFiles()


def test_only_the_first_creation_succeeds(folder):
    path = join(folder, "deep/x")
    assert FILES.create(path, b"first") is not None
    assert FILES.create(path, b"second") is None
    assert read_bytes(path) == b"first"
    assert [entry.relative_path for entry in list_files(folder)] == ["deep/x"]


def test_a_file_is_replaced_only_at_the_expected_version(folder):
    path = join(folder, "x")
    assert FILES.replace(path, "123", b"b") is None
    first = FILES.create(path, b"a")
    second = FILES.replace(path, first, b"a")  # the same content makes a new version
    assert second is not None
    assert second != first
    assert FILES.replace(path, first, b"c") is None
    assert FILES.read(path) == (b"a", second)
    third = FILES.replace(path, second, b"c")
    assert FILES.read(path) == (b"c", third)


def test_an_unconditional_write_makes_a_new_version(folder):
    path = join(folder, "x")
    first = FILES.create(path, b"a")
    write_bytes(path, b"a")
    assert FILES.replace(path, first, b"c") is None


def test_a_file_is_removed_only_at_the_expected_version(folder):
    path = join(folder, "x")
    first = FILES.create(path, b"a")
    assert first is not None
    second = FILES.replace(path, first, b"b")
    assert second is not None
    assert not FILES.remove(path, first)
    assert exists(path)
    assert FILES.remove(path, second)
    assert not exists(path)
    assert FILES.remove(path, second)  # removing a missing file succeeds, whoever removed it


def test_a_listing_contains_the_versions(folder):
    version = FILES.create(join(folder, "x"), b"a")
    assert [entry.version for entry in list_files(folder)] == [version]
    assert FILES.version_of(join(folder, "x")) == version
    assert FILES.version_of(join(folder, "y")) is None
    with pytest.raises(PathNotFoundError):
        FILES.read(join(folder, "y"))


@pytest.mark.parametrize("expected_is_there", [False, True])
def test_exactly_one_of_many_concurrent_writers_wins(folder, expected_is_there):
    path = join(folder, "x")
    expected = FILES.create(path, b"old") if expected_is_there else None
    start = threading.Barrier(8)
    winners: list[int] = []

    def write(number: int):
        start.wait()
        if FILES.replace(path, expected, str(number).encode()) is not None:
            winners.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_bytes(path)] == [str(number).encode() for number in winners]


def test_creation_is_exclusive_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(source: str, target: str):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    path = str(tmp_path / "x")
    version = FILES.create(path, b"first")
    assert FILES.create(path, b"second") is None
    assert FILES.read(path) == (b"first", version)
    assert os.listdir(tmp_path) == ["x"]


def test_a_lock_that_is_never_released_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = str(tmp_path / "x")
    version = FILES.create(path, b"old")
    monkeypatch.setattr(local_versions, "_LOCK_WAIT_SECONDS", 0.05)
    with local_versions.held_still(path), pytest.raises(StorageError, match="Is that process stopped"):
        FILES.replace(path, version, b"new")
    assert FILES.replace(path, version, b"new") is not None


def test_a_file_system_without_conditional_writes_is_refused_without_unsafe_locks():
    with pytest.raises(StorageError, match="pass --unsafe_locks"):
        FILES.create("ftp://host/x", b"")
    ConditionalFiles(unsafe_locks=True).check("ftp://host/x")


class Plain(MemoryFileSystem):
    """File system that only supports reading and writing."""

    protocol = "plain"


def test_versions_are_still_compared_with_unsafe_locks():
    fsspec.register_implementation("plain", Plain, clobber=True)
    files = ConditionalFiles(unsafe_locks=True)
    first = files.create("plain://x", b"a")
    assert files.create("plain://x", b"b") is None
    second = files.replace("plain://x", first, b"b")
    assert files.replace("plain://x", first, b"c") is None
    assert files.read("plain://x") == (b"b", second)
    assert second is not None
    assert files.remove("plain://x", second)
    assert files.version_of("plain://x") is None
