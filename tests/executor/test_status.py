import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.executor.records import status
from simpo_pipeline.executor.records.lease import LeaseConfig, LeaseWatch
from simpo_pipeline.executor.records.status import Status
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.files import remove_tree, write_bytes, write_json, write_text
from simpo_pipeline.storage.paths import join


def read(path: str) -> status.StepRecord:
    return status.read_record(path, LeaseWatch(LeaseConfig()))


def test_a_path_where_nothing_ran_has_an_empty_record(prefix):
    assert read(join(prefix, "step")) == status.StepRecord()


def commit_here(path: str) -> None:
    write_bytes(join(path, status.MANIFEST_FILE), status.manifest_bytes(status.find_outputs(path)))
    write_text(join(path, status.STATUS_FILE), "SUCCESS")


@pytest.mark.parametrize("token", list(Status))
def test_every_token_is_read_back(prefix, token):
    write_text(join(prefix, status.STATUS_FILE), token.value)
    assert read(prefix).status is token


def test_only_success_with_a_manifest_is_done(prefix):
    write_text(join(prefix, status.STATUS_FILE), "SUCCESS")
    assert not read(prefix).done
    commit_here(prefix)
    assert read(prefix).done
    write_text(join(prefix, status.STATUS_FILE), "RUNNING")
    assert not read(prefix).done


def test_outputs_that_differ_from_the_manifest_are_not_believed(prefix):
    write_text(join(prefix, "rows.jsonl"), "123")
    commit_here(prefix)
    write_text(join(prefix, "rows.jsonl"), "12")
    assert read(prefix).manifest_problem == "lists rows.jsonl with 3 bytes, but it has 2"
    remove_tree(join(prefix, "rows.jsonl"))
    assert read(prefix).manifest_problem == "lists rows.jsonl, which is gone"
    write_text(join(prefix, "manifest.json"), "{")
    assert read(prefix).manifest_problem == "cannot be read"
    assert not read(prefix).done


def test_an_extra_file_next_to_the_outputs_does_not_invalidate_them(prefix):
    write_text(join(prefix, "rows.jsonl"), "123")
    commit_here(prefix)
    write_text(join(prefix, "notes.txt"), "mine")
    assert read(prefix).done


def test_a_manifest_is_read_back(prefix):
    write_text(join(prefix, "a/b.txt"), "123456789")
    commit_here(prefix)
    assert status.read_manifest(prefix) == [FileEntry("a/b.txt", 9, "e3069283")]


def test_a_manifest_that_is_missing_or_damaged_is_an_error_naming_it(prefix):
    with pytest.raises(PathNotFoundError, match=r"manifest\.json"):
        status.read_manifest(prefix)
    for damaged in ([], {"files": [{}]}, {"files": 3}, None):
        write_json(join(prefix, "manifest.json"), damaged)
        with pytest.raises(StorageError, match=r"manifest\.json"):
            status.read_manifest(prefix)


@settings(max_examples=50)
@given(st.binary(max_size=100), st.binary(max_size=100))
def test_a_record_can_be_read_with_any_content_of_status_and_lease(tmp_path_factory, token, lease):
    folder = str(tmp_path_factory.mktemp("record"))
    write_bytes(join(folder, status.STATUS_FILE), token)
    write_bytes(join(folder, status.LEASE_FILE), lease)
    write_bytes(join(folder, status.MANIFEST_FILE), b"{}")
    record = read(folder)
    assert record.done == (token.strip() == b"SUCCESS")
    assert (record.status is None) == (record.unreadable_status is not None)
    assert record.lease is not None
    json.dumps(record.unreadable_status)
