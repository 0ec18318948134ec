import os
import stat
import threading
from pathlib import Path

import pytest

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.storage import files
from simpo_pipeline.storage.paths import join


def sizes_in(folder: str) -> dict[str, int]:
    """The files of a folder and their sizes, in the order of the listing."""
    return {entry.relative_path: entry.num_bytes for entry in files.list_files(folder)}


def test_bytes_text_and_json_are_read_back_as_written(folder):
    files.write_bytes(join(folder, "a/b/raw"), b"\x00\xff")
    files.write_text(join(folder, "text"), "größer")
    files.write_json(join(folder, "value.json"), {"list": [1, 2.5, None], "text": "ü"})
    assert files.read_bytes(join(folder, "a/b/raw")) == b"\x00\xff"
    assert files.read_text(join(folder, "text")) == "größer"
    assert files.read_json(join(folder, "value.json")) == {"list": [1, 2.5, None], "text": "ü"}


def test_an_empty_file_can_be_written_and_read(folder):
    files.write_bytes(join(folder, "empty"), b"")
    assert files.read_bytes(join(folder, "empty")) == b""
    assert sizes_in(folder) == {"empty": 0}


def test_a_second_write_replaces_the_first(folder):
    files.write_text(join(folder, "x"), "a long first text")
    files.write_text(join(folder, "x"), "second")
    assert files.read_text(join(folder, "x")) == "second"


def test_reading_a_missing_path_names_the_path(folder):
    missing = join(folder, "nothing")
    for read in (files.read_bytes, files.read_text, files.read_json, files.open_read):
        with pytest.raises(PathNotFoundError, match="nothing is stored there") as caught:
            read(missing)
        assert missing in str(caught.value)
    with pytest.raises(PathNotFoundError), files.local_copy(missing):
        pass


def test_a_missing_path_is_also_a_file_not_found_error_of_python(folder):
    with pytest.raises(FileNotFoundError):
        files.read_bytes(join(folder, "nothing"))


def test_text_that_is_not_json_or_not_utf8_is_a_storage_error_naming_the_file(folder):
    files.write_bytes(join(folder, "bad"), b"\xff{")
    with pytest.raises(StorageError, match="bad"):
        files.read_json(join(folder, "bad"))
    with pytest.raises(StorageError, match="bad"):
        files.read_text(join(folder, "bad"))


def test_an_unknown_scheme_is_a_storage_error():
    with pytest.raises(StorageError, match="nosuchscheme"):
        files.read_bytes("nosuchscheme://bucket/x")


def test_a_listing_has_every_file_at_any_depth_sorted_with_its_size(folder):
    for name in ("b", "a/deep/er", ".hidden", "a/z"):
        files.write_text(join(folder, name), name)
    assert list(sizes_in(folder).items()) == [(".hidden", 7), ("a/deep/er", 9), ("a/z", 3), ("b", 1)]
    assert files.list_names(folder) == [".hidden", "a", "b"]


def test_a_listing_of_a_missing_path_is_empty(folder):
    assert files.list_files(join(folder, "nothing")) == []
    assert files.list_names(join(folder, "nothing")) == []


def test_a_listing_contains_a_file_written_after_the_previous_listing(folder):
    files.write_text(join(folder, "one"), "1")
    assert len(files.list_files(folder)) == 1
    files.write_text(join(folder, "two"), "2")
    assert len(files.list_files(folder)) == 2


def test_a_tree_is_removed_and_removing_it_again_does_nothing(folder):
    files.write_text(join(folder, "tree/a/b"), "x")
    files.remove_tree(join(folder, "tree"))
    assert not files.exists(join(folder, "tree/a/b"))
    assert not files.exists(join(folder, "tree"))
    files.remove_tree(join(folder, "tree"))


def test_a_streamed_write_that_raises_leaves_the_old_content_and_no_other_file(folder):
    target = join(folder, "x")
    files.write_text(target, "old")
    with pytest.raises(RuntimeError, match="stop"), files.open_write(target) as file:
        file.write(b"half of the new con")
        raise RuntimeError("stop")
    assert files.read_text(target) == "old"
    assert [entry.relative_path for entry in files.list_files(folder)] == ["x"]


def test_a_streamed_read_returns_the_content_in_chunks(folder):
    files.write_bytes(join(folder, "x"), b"0123456789")
    with files.open_read(join(folder, "x")) as file:
        assert [file.read(4), file.read(4), file.read(4)] == [b"0123", b"4567", b"89"]


def test_a_local_copy_of_a_file_has_its_content_and_its_name(folder):
    files.write_text(join(folder, "weights.bin"), "w")
    with files.local_copy(join(folder, "weights.bin")) as copy:
        assert copy.name == "weights.bin"
        assert copy.read_text() == "w"


def test_a_local_copy_of_a_folder_has_all_its_files(folder):
    files.write_text(join(folder, "model/config.json"), "{}")
    files.write_text(join(folder, "model/parts/0"), "zero")
    with files.local_copy(join(folder, "model")) as copy:
        assert (copy / "config.json").read_text() == "{}"
        assert (copy / "parts" / "0").read_text() == "zero"


def test_a_local_path_is_its_own_copy_and_is_kept(tmp_path: Path):
    (tmp_path / "x").write_text("x")
    with files.local_copy(str(tmp_path / "x")) as copy:
        assert copy == tmp_path / "x"
    assert (tmp_path / "x").exists()


def test_a_downloaded_copy_is_removed_at_the_end_of_its_block():
    files.write_text("memory://copies/x", "x")
    with files.local_copy("memory://copies/x") as copy:
        assert copy.exists()
    assert not copy.exists()
    files.remove_tree("memory://copies")


def test_a_local_file_is_uploaded_completely(folder, tmp_path: Path):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 5000)
    files.upload(source, join(folder, "deep/target"))
    assert files.read_bytes(join(folder, "deep/target")) == source.read_bytes()


def test_file_urls_are_local_paths(tmp_path: Path):
    files.write_text(f"file://{tmp_path}/x", "x")
    assert (tmp_path / "x").read_text() == "x"
    assert files.read_text(f"file://{tmp_path}/x") == "x"


def test_readers_see_the_old_text_or_the_new_while_it_is_replaced(tmp_path: Path):
    path = str(tmp_path / "x")
    texts = ("a" * 100_000, "b" * 200_000)
    files.write_text(path, texts[0])
    stop = threading.Event()
    seen: set[str] = set()

    def read_until_stopped():
        while not stop.is_set():
            seen.add(files.read_text(path))

    reader = threading.Thread(target=read_until_stopped)
    reader.start()
    for turn in range(40):
        files.write_text(path, texts[turn % 2])
    stop.set()
    reader.join()
    assert seen and seen <= set(texts)


def test_a_path_that_cannot_be_written_is_a_storage_error_naming_it(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="below"):
        files.write_text(str(tmp_path / "file" / "below"), "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_a_storage_error(tmp_path: Path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StorageError, match="permissions"):
        files.write_text(str(tmp_path / "x"), "x")


def test_a_stored_name_that_would_escape_its_folder_is_not_copied():
    files.write_text("memory://copies/x", "x")
    files.write_text("memory://copies/../../evil", "x")
    with pytest.raises(StorageError, match="outside its folder"), files.local_copy("memory://copies"):
        pass
    files.remove_tree("memory://copies")
