"""No function that writes changes anything behind a closed fence."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from simpo_pipeline.errors import LeaseLostError
from simpo_pipeline.storage.files import list_files, read_text, write_text
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join


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


def stream(output: OutputFolder) -> None:
    with output.open_write("x") as file:
        file.write(b"new")


WRITES: dict[str, Callable[[OutputFolder], None]] = {
    "text": lambda output: output.write_text("x", "new"),
    "json": lambda output: output.write_json("x", "new"),
    "stream": stream,
    "upload": lambda output: output.upload(Path(__file__), "x"),
    "remove": lambda output: output.remove("x"),
    "rows": lambda output: output.open_rows("x").write({"new": 1}),
    "subfolder": lambda output: output.subfolder("y").write_text("x", "new"),
}


@pytest.mark.parametrize("write", WRITES)
def test_files_behind_a_closed_fence_are_unchanged(folder, write: str):
    write_text(join(folder, "step/x"), "old")
    with pytest.raises(LeaseLostError):
        WRITES[write](OutputFolder(join(folder, "step"), Closed()))
    assert read_text(join(folder, "step/x")) == "old"
    assert [entry.relative_path for entry in list_files(folder)] == ["step/x"]


@pytest.mark.parametrize("write", ["text", "json", "stream", "upload"])
def test_a_file_does_not_appear_if_the_fence_closes_while_it_is_written(folder, write: str):
    write_text(join(folder, "step/x"), "old")
    with pytest.raises(LeaseLostError):
        WRITES[write](OutputFolder(join(folder, "step"), Closed(passes=1)))
    assert read_text(join(folder, "step/x")) == "old"
    assert [entry.relative_path for entry in list_files(folder)] == ["step/x"]


def test_rows_after_the_fence_closed_are_refused(folder):
    fence = Closed(passes=2)
    with pytest.raises(LeaseLostError):
        with OutputFolder(join(folder, "step"), fence).open_rows("rows.jsonl") as writer:
            for number in range(3):
                writer.write({"number": number})
    assert fence.passes < 0


@pytest.mark.parametrize("passes", [0, 1])
def test_a_staged_folder_is_not_uploaded_behind_a_closed_fence(passes: int):
    output = OutputFolder("memory://staged/step", Closed(passes))
    with pytest.raises(LeaseLostError), output.staged() as staged:
        (staged / "x").write_text("new")
    assert list_files("memory://staged") == []


def test_a_fence_closes_only_its_own_folder(folder):
    output = OutputFolder(join(folder, "step"), Closed())
    OutputFolder(folder).write_text("step-2/x", "new")
    OutputFolder(join(folder, "step")).write_text("x", "new")
    with pytest.raises(LeaseLostError):
        output.write_text("y", "new")
    assert len(list_files(folder)) == 2
