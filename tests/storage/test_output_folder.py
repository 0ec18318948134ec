"""An output folder writes files below its path; a staged folder is uploaded completely or not at all."""

import uuid
from contextlib import nullcontext

import pytest

from simpo_pipeline.errors import LeaseLostError, StorageError
from simpo_pipeline.storage.files import list_files, read_text, write_text
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join


@pytest.fixture(params=["local", "memory"])
def target(request, tmp_path):
    return str(tmp_path / "a" / "b") if request.param == "local" else f"memory://{uuid.uuid4().hex}/b"


def test_files_at_all_depths_are_uploaded(target):
    with OutputFolder(target).staged() as folder:
        (folder / "x.txt").write_text("one")
        (folder / "sub").mkdir()
        (folder / "sub" / "y.txt").write_text("two")
    assert [entry.relative_path for entry in list_files(target)] == ["sub/y.txt", "x.txt"]
    assert read_text(join(target, "sub", "y.txt")) == "two"


def test_a_failure_uploads_nothing():
    target = f"memory://{uuid.uuid4().hex}/b"
    with pytest.raises(RuntimeError, match="stop"), OutputFolder(target).staged() as folder:
        (folder / "x.txt").write_text("one")
        raise RuntimeError("stop")
    assert list_files(target) == []


def test_every_kind_of_file_is_written_below_the_folder(target):
    output = OutputFolder(target)
    output.write_text("text.txt", "words")
    output.subfolder("deep").write_json("value.json", {"a": 1})
    with output.open_write("bytes") as file:
        file.write(b"data")
    with output.open_rows("rows.jsonl") as rows:
        rows.write({"b": 2})
    names = ["bytes", "deep/value.json", "rows.jsonl", "text.txt"]
    assert [entry.relative_path for entry in list_files(target)] == names
    assert [read_text(output.path_of(name)) for name in names] == ["data", '{\n  "a": 1\n}\n', '{"b": 2}\n', "words"]
    output.remove("deep")
    assert [entry.relative_path for entry in list_files(target)] == ["bytes", "rows.jsonl", "text.txt"]


def test_a_name_outside_the_folder_is_refused(target):
    for name in ("/etc/x", "gs://bucket/x", "../x"):
        with pytest.raises(StorageError, match="relative"):
            OutputFolder(target).write_text(name, "words")


def test_names_of_the_folder_itself_and_of_its_owner_are_refused(target):
    output = OutputFolder(target, reserved=("manifest.json",))
    output.write_text("x", "words")
    for name in ("", ".", "./x", "x/"):
        with pytest.raises(StorageError, match="is no name inside the folder"):
            output.remove(name)
    for write in (output.remove, lambda name: output.write_json(name, 1), output.open_rows):
        with pytest.raises(StorageError, match="is written by the executor"):
            write("manifest.json")
    assert [entry.relative_path for entry in list_files(target)] == ["x"]


def test_staged_files_appear_only_after_the_block_and_what_a_killed_process_left_is_removed(tmp_path):
    output = OutputFolder(str(tmp_path / "step"))
    output.write_text("model", "old")
    (tmp_path / "step" / ".staging-of-a-killed-process").mkdir()
    with output.staged() as folder:
        (folder / "model").write_text("new")
        assert read_text(output.path_of("model")) == "old"
    assert read_text(output.path_of("model")) == "new"
    assert [entry.relative_path for entry in list_files(output.path)] == ["model"]
    assert not list((tmp_path / "step").glob(".*"))


def test_staged_files_do_not_replace_those_of_the_next_holder(tmp_path):
    class Closing:
        closed = False

        def check(self) -> None:
            if self.closed:
                raise LeaseLostError("closed")

        def hold(self):
            self.check()
            return nullcontext()

    fence = Closing()
    write_text(str(tmp_path / "model"), "of the next holder")
    with pytest.raises(LeaseLostError), OutputFolder(str(tmp_path), fence).staged() as folder:
        (folder / "model").write_text("late")
        fence.closed = True
    assert read_text(str(tmp_path / "model")) == "of the next holder"
