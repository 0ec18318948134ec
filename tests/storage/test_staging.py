"""A staged folder is filled locally and then uploaded to its path, completely or not at all."""

import uuid

import pytest

from simpo_pipeline.storage.files import list_files, read_text
from simpo_pipeline.storage.paths import join
from simpo_pipeline.storage.staging import staged_folder


@pytest.fixture(params=["local", "memory"])
def target(request, tmp_path):
    return str(tmp_path / "a" / "b") if request.param == "local" else f"memory://{uuid.uuid4().hex}/b"


def test_files_at_all_depths_are_uploaded(target):
    with staged_folder(target) as folder:
        (folder / "x.txt").write_text("one")
        (folder / "sub").mkdir()
        (folder / "sub" / "y.txt").write_text("two")
    assert [entry.relative_path for entry in list_files(target)] == ["sub/y.txt", "x.txt"]
    assert read_text(join(target, "sub", "y.txt")) == "two"


def test_a_failure_uploads_nothing():
    target = f"memory://{uuid.uuid4().hex}/b"
    with pytest.raises(RuntimeError, match="stop"), staged_folder(target) as folder:
        (folder / "x.txt").write_text("one")
        raise RuntimeError("stop")
    assert list_files(target) == []
