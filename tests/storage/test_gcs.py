"""Google Cloud Storage over HTTP: paged listings, and writes whose responses are lost."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.files import list_files, list_names, read_bytes, write_bytes
from simpo_pipeline.storage.paths import join

FILES = ConditionalFiles()


def test_a_listing_of_many_pages_is_complete_and_has_checksums(gcs, gcs_here):
    names = [f"{number // 100}/{number}" for number in range(1_010)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: write_bytes(join(gcs_here, name), b"123456789"), names))
    gcs.reset_log()
    entries = list_files(gcs_here)
    assert [entry.relative_path for entry in entries] == sorted(names)
    assert {(entry.num_bytes, entry.crc32c) for entry in entries} == {(9, "e3069283")}
    assert all(entry.modified is not None and entry.version is not None for entry in entries)
    assert [request["kind"] for request in gcs.log()] == ["list", "list"]
    assert list_names(gcs_here) == [str(number) for number in (0, 1, 10, *range(2, 10))]
    assert list_files(join(gcs_here, "nothing")) == []


@pytest.mark.parametrize("fault", ["cut_after", "cut_before"])
def test_a_conditional_write_whose_response_was_lost_reports_success(gcs, gcs_here, fault):
    path = join(gcs_here, "lock")
    gcs.faults(kinds=[fault], times=1, methods=["POST"])
    first = FILES.create(path, b"one")
    assert FILES.read(path) == (b"one", first)
    gcs.faults(kinds=[fault], times=1, methods=["POST"])
    second = FILES.replace(path, first, b"one")
    assert second != first
    assert FILES.read(path) == (b"one", second)


def test_a_removal_whose_response_was_lost_reports_success(gcs, gcs_here):
    path = join(gcs_here, "lock")
    version = FILES.create(path, b"one")
    assert version is not None
    gcs.faults(kinds=["delete_lost"], times=1)
    assert FILES.remove(path, version)
    assert list_files(gcs_here) == []


def test_an_outdated_write_fails_even_if_the_content_is_the_same(gcs, gcs_here):
    path = join(gcs_here, "lock")
    first = FILES.create(path, b"one")
    assert FILES.replace(path, first, b"two") is not None
    assert FILES.replace(path, first, b"two") is None  # the same content, but written by another writer
    assert read_bytes(path) == b"two"


def test_a_missing_bucket_is_an_error_that_names_the_path(gcs_here):
    path = "gs://no-such-bucket/lock"
    with pytest.raises(PathNotFoundError, match="no-such-bucket"):
        FILES.create(path, b"one")
    with pytest.raises(StorageError, match="no-such-bucket"):
        list_files("gs://no-such-bucket/folder")
