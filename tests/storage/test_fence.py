"""No writer of the storage package changes anything behind a closed fence."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from simpo_pipeline.errors import LeaseLostError
from simpo_pipeline.storage.fence import fenced
from simpo_pipeline.storage.files import list_files, open_write, read_text, remove_tree, upload, write_text
from simpo_pipeline.storage.jsonl import JsonlWriter
from simpo_pipeline.storage.paths import join
from simpo_pipeline.storage.staging import staged_folder


class Closed:
    """Fence that refuses every write after the first `passes` checks."""

    def __init__(self, passes: int = 0):
        self.passes = passes

    def check(self) -> None:
        self.passes -= 1
        if self.passes < 0:
            raise LeaseLostError("closed")

    @contextmanager
    def hold(self):
        self.check()
        yield


def stream(path: str) -> None:
    with open_write(path) as file:
        file.write(b"new")


def upload_file(path: str) -> None:
    upload(Path(__file__), path)


def open_rows(path: str) -> None:
    JsonlWriter(path).write({"new": 1})


@pytest.mark.parametrize("write", [lambda path: write_text(path, "new"), stream, upload_file, remove_tree, open_rows])
def test_files_behind_a_closed_fence_are_unchanged(folder, write: Callable[[str], None]):
    path = join(folder, "step/x")
    write_text(path, "old")
    with fenced(join(folder, "step"), Closed()), pytest.raises(LeaseLostError):
        write(path)
    assert read_text(path) == "old"
    assert [entry.relative_path for entry in list_files(folder)] == ["step/x"]


def test_a_file_does_not_appear_if_the_fence_closes_while_it_is_written(tmp_path: Path):
    path = str(tmp_path / "step/x")
    write_text(path, "old")
    with fenced(str(tmp_path / "step"), Closed(passes=1)), pytest.raises(LeaseLostError):
        write_text(path, "new")
    assert read_text(path) == "old"
    assert [entry.relative_path for entry in list_files(str(tmp_path))] == ["step/x"]


def test_rows_after_the_fence_closed_are_refused(folder):
    path = join(folder, "step/rows.jsonl")
    fence = Closed(passes=2)
    with fenced(join(folder, "step"), fence), pytest.raises(LeaseLostError):
        with JsonlWriter(path) as writer:
            for number in range(3):
                writer.write({"number": number})
    assert fence.passes < 0


def test_a_staged_folder_is_not_uploaded_behind_a_closed_fence():
    with fenced("memory://staged/step", Closed()), pytest.raises(LeaseLostError):
        with staged_folder("memory://staged/step") as staged:
            (staged / "x").write_text("new")
    assert list_files("memory://staged") == []


def test_paths_outside_the_fence_can_be_written(folder):
    with fenced(join(folder, "step"), Closed()), fenced(join(folder, "step"), Closed()):
        write_text(join(folder, "step-2/x"), "new")
        write_text(join(folder, "y"), "new")
    write_text(join(folder, "step/x"), "new")
    assert len(list_files(folder)) == 3
