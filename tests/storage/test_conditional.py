import errno
import os
import threading
from pathlib import Path

import pytest

from simpo_pipeline.errors import StorageError
from simpo_pipeline.storage.conditional import create_only, remove_if_same, replace_if_same
from simpo_pipeline.storage.files import exists, list_files, read_bytes, write_bytes
from simpo_pipeline.storage.paths import join


def test_only_the_first_creation_succeeds(folder):
    assert create_only(join(folder, "deep/x"), b"first")
    assert not create_only(join(folder, "deep/x"), b"second")
    assert read_bytes(join(folder, "deep/x")) == b"first"
    assert [entry.relative_path for entry in list_files(folder)] == ["deep/x"]


def test_of_many_threads_creating_one_file_exactly_one_wins(tmp_path: Path):
    path = str(tmp_path / "x")
    start = threading.Barrier(16)
    winners: list[int] = []

    def create(number: int):
        start.wait()
        if create_only(path, str(number).encode()):
            winners.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_bytes(path)] == [str(number).encode() for number in winners]


def test_creation_is_exclusive_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(source: str, target: str):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    assert create_only(str(tmp_path / "x"), b"first")
    assert not create_only(str(tmp_path / "x"), b"second")
    assert read_bytes(str(tmp_path / "x")) == b"first"


def test_a_file_is_replaced_only_while_it_is_as_expected(folder):
    path = join(folder, "x")
    assert not replace_if_same(path, b"a", b"b")
    write_bytes(path, b"a")
    assert replace_if_same(path, b"a", b"b")
    assert not replace_if_same(path, b"a", b"c")
    assert read_bytes(path) == b"b"


def test_a_file_is_removed_only_while_it_is_as_expected(folder):
    path = join(folder, "x")
    write_bytes(path, b"a")
    assert not remove_if_same(path, b"b")
    assert exists(path)
    assert remove_if_same(path, b"a")
    assert not exists(path)
    assert not remove_if_same(path, b"a")


def test_of_many_threads_replacing_one_content_exactly_one_wins(tmp_path: Path):
    path = str(tmp_path / "x")
    write_bytes(path, b"old")
    start = threading.Barrier(8)
    winners: list[int] = []

    def replace(number: int):
        start.wait()
        if replace_if_same(path, b"old", str(number).encode()):
            winners.append(number)

    threads = [threading.Thread(target=replace, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_bytes(path)] == [str(number).encode() for number in winners]


def test_a_file_system_without_create_only_writes_is_refused():
    with pytest.raises(StorageError, match="no create-only write"):
        create_only("http://host/x", b"")
