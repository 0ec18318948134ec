"""What a step reads from outside is identified by its content, and the plan names the file that changed."""

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simpo_pipeline.errors import ConfigError, IdentityError, StepFailedError, StorageError
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.planning.graph import build_graph
from simpo_pipeline.executor.step import ExecutorStep, content_of, outside_path, versioned
from simpo_pipeline.storage import content
from simpo_pipeline.storage.files import read_text, write_text

# The check value of CRC-32C in the catalogue of parametrised CRC algorithms.
CHECKED, CHECK_VALUE = b"123456789", "e3069283"


@dataclass(frozen=True)
class Prompts:
    path: str | None = dataclasses.field(default=None, metadata=outside_path())
    template: str = "{index}"


@dataclass(frozen=True)
class Config:
    prompts: Any = None
    model: str = dataclasses.field(default="", metadata=outside_path(("*.json", "*.safetensors")))


def version_of(config: Any) -> dict[str, Any]:
    step = ExecutorStep("reads", read, config)
    return dict(build_graph([step], "/p").identities[step].version["config"])


def read(config: Config) -> None:
    """Do nothing."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "prompts.txt"
    found.write_bytes(CHECKED)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_file_is_identified_by_the_checksum_of_its_content_and_not_by_its_path(file, tmp_path):
    assert version_of({"vocabulary": content_of(str(file))}) == {"vocabulary": CHECK_VALUE}
    assert version_of(Config(prompts=Prompts(str(file)))) == {"prompts.path": f"{CHECK_VALUE}.txt"}
    as_path: Any = file
    assert version_of(Config(prompts=Prompts(as_path))) == version_of(Config(prompts=Prompts(f"file://{file}")))
    inside = version_of(Config(prompts=versioned(Prompts(str(file)))))
    assert inside["prompts"]["path"] == {"!content": f"{CHECK_VALUE}.txt"}
    elsewhere = tmp_path / "other" / "name.txt"
    elsewhere.parent.mkdir()
    file.rename(elsewhere)
    assert version_of(Config(prompts=versioned(Prompts(str(elsewhere))))) == inside
    # The ending of a name says how a file is read.
    elsewhere.rename(tmp_path / "name.jsonl.gz")
    assert version_of(Config(prompts=Prompts(str(tmp_path / "name.jsonl.gz")))) == {
        "prompts.path": f"{CHECK_VALUE}.jsonl.gz"
    }


def test_a_path_where_nothing_exists_is_identified_as_any_other_value(tmp_path):
    missing = str(tmp_path / "missing")
    assert version_of(Config(model=versioned("org/name"))) == {"model": "org/name"}
    assert version_of(Config(model="org/name")) == {}
    assert version_of(Config(model=versioned("https://example.org/model"))) == {"model": "https://example.org/model"}
    (tmp_path / "file").touch()
    for path in (missing, f"{tmp_path}/file/name"):
        assert version_of({"a": content_of(path)}) == {"a": path}
    assert version_of(Config(versioned(Prompts()))) == {
        "prompts": {"!dataclass": "Prompts", "path": None, "template": "{index}"}
    }


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("~/model", ConfigError, "'~' is not replaced by a home folder. Write the whole path"),
        ("gs:/bucket/model", ConfigError, "is a URL that lost a slash. Write 'gs://bucket/model'"),
        ("gs:///model", ConfigError, "names no bucket"),
        ("loop", StorageError, "Too many levels of symbolic links"),
    ],
)
def test_a_path_that_leads_nowhere_by_mistake_is_refused_in_the_plan(path, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for config in (Config(model=path), Config(versioned(Prompts(path))), {"a": content_of(path)}):
        with pytest.raises(kind, match=message):
            version_of(config)


def test_files_behind_links_to_folders_count_once_for_each_name(tmp_path):
    folder, behind = tmp_path / "data", tmp_path / "behind"
    folder.mkdir()
    behind.mkdir()
    (behind / "file").write_bytes(CHECKED)
    for name in ("one", "two"):
        (folder / name).symlink_to(behind)
    (behind / "back").symlink_to(folder)
    (folder / "gone").symlink_to("nowhere")
    expected = {"[0]['one/file']": CHECK_VALUE, "[0]['two/file']": CHECK_VALUE}
    assert version_of([content_of(str(folder))]) == expected
    (tmp_path / "link").symlink_to(folder)
    assert version_of([content_of(str(tmp_path / "link"))]) == expected


def test_a_set_of_references_to_files_is_refused(file):
    with pytest.raises(IdentityError, match=r"A set contains Prompts\(.*\), which refers to files .* Use a list"):
        version_of(Config(versioned({Prompts(str(file))})))


@pytest.mark.parametrize("where", ["local", "memory", "gs"])
def test_of_a_folder_only_the_files_that_are_read_count_and_each_has_its_own_checksum(where, tmp_path, request):
    if where == "gs":
        folder = f"{request.getfixturevalue('gcs_here')}/model"
    else:
        folder = str(tmp_path / "model") if where == "local" else f"memory://{tmp_path.name}/model"
    for name in ("config.json", "a.safetensors", "README.md", "original/config.json"):
        write_text(f"{folder}/{name}", CHECKED.decode())
    expected = {"model['config.json']": CHECK_VALUE, "model['a.safetensors']": CHECK_VALUE}
    assert version_of(Config(model=versioned(folder))) == version_of(Config(model=folder)) == expected
    write_text(f"{folder}/README.md", "changed")
    assert version_of(Config(model=folder)) == expected
    write_text(f"{folder}/a.safetensors", "changed")
    assert version_of(Config(model=folder)) != expected
    assert len(version_of({"all": content_of(folder)})) == 4
    assert version_of({"one": content_of(f"{folder}/config.json")}) == {"one": CHECK_VALUE}


def test_an_object_of_google_cloud_storage_is_identified_without_reading_it(gcs_here, monkeypatch):
    write_text(f"{gcs_here}/data/pairs.jsonl", CHECKED.decode())
    monkeypatch.setattr(content, "crc32c_of", lambda path: pytest.fail("it was read"))
    assert version_of({"file": content_of(f"{gcs_here}/data/pairs.jsonl")}) == {"file": CHECK_VALUE}
    assert version_of({"folder": content_of(f"{gcs_here}/data")}) == {"folder['pairs.jsonl']": CHECK_VALUE}


@pytest.mark.parametrize("make", [lambda path: versioned(Prompts(path)), Prompts, content_of])
def test_the_plan_says_which_file_changed(make, file, tmp_path):
    def plan(*, dry_run: bool) -> Any:
        executor = Executor(str(tmp_path / "runs"))
        executor.run([ExecutorStep("infer", read, Config(make(str(file))))], dry_run=dry_run)
        return executor.plan[0]

    plan(dry_run=False)
    assert plan(dry_run=True).action == "SKIP"
    file.write_bytes(b"987654321")
    changed = plan(dry_run=True)
    assert changed.action == "RUN"
    assert f"{CHECK_VALUE}" in changed.reason and f"(content of {file})" in changed.reason


def test_a_large_file_is_read_again_only_if_it_changed(file, monkeypatch):
    file.write_bytes(bytes(2 << 20))
    hour_ago = time.time() - 3600
    os.utime(file, (hour_ago, hour_ago))
    monkeypatch.setattr(content, "_CLOCK_TICK_NS", 0)
    reads: list[str] = []
    crc32c_of = content.crc32c_of
    monkeypatch.setattr(content, "crc32c_of", lambda path: reads.append(path) or crc32c_of(path))
    first = content.content_checksums(str(file))
    assert content.content_checksums(str(file)) == first and len(reads) == 1
    # Changed in place, with the same size and time of modification.
    with file.open("r+b") as opened:
        opened.write(b"1")
    os.utime(file, (hour_ago, hour_ago))
    assert content.content_checksums(str(file)) != first
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_refused(file, monkeypatch):
    file.write_bytes(bytes(2 << 20))
    monkeypatch.setattr(content, "crc32c_of", lambda path: Path(path).write_bytes(bytes(3 << 20)) and "0")
    with pytest.raises(StorageError, match=r"changed while its checksum was computed\. Start again when"):
        content.content_checksums(str(file))


def test_a_checksum_is_not_cached_if_the_file_could_change_again_without_another_time(file, tmp_path, monkeypatch):
    file.write_bytes(bytes(2 << 20))
    # Changed one second before it is read, which takes ten: a change meanwhile may leave the same time on FAT.
    clock = [file.stat().st_ctime_ns + 1_000_000_000]
    crc32c_of = content.crc32c_of

    def read(path: str) -> str:
        clock[0] += 10_000_000_000
        return crc32c_of(path)

    monkeypatch.setattr(content, "crc32c_of", read)
    monkeypatch.setattr(content.time, "time_ns", lambda: clock[0])
    for num_cached in (0, 1):
        content.content_checksums(str(file))
        assert len(list((tmp_path / "cache").rglob("*.json"))) == num_cached


def test_a_damaged_cache_or_one_that_cannot_be_written_only_warns(file, tmp_path, monkeypatch, caplog):
    file.write_bytes(bytes(2 << 20))
    monkeypatch.setattr(content, "_CLOCK_TICK_NS", 0)
    expected = content.content_checksums(str(file))
    (cached,) = (tmp_path / "cache").rglob("*.json")
    entry = json.loads(cached.read_text())
    for text in ("{", "[]", "{}", json.dumps({**entry, "crc32c": "?"}), json.dumps({**entry, "crc32c": None})):
        cached.write_text(text)
        assert content.content_checksums(str(file)) == expected
    cached.parent.rename(tmp_path / "moved")
    cached.parent.write_text("not a folder")
    assert content.content_checksums(str(file)) == expected
    assert "cannot be cached" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(b"changed"),
        lambda file: file.unlink(),
        lambda file: file.with_name("new.txt").write_text("appeared"),
        lambda file: (file.unlink(), file.mkdir(), (file / "inside").write_text("now a folder")),
    ],
)
def test_a_file_that_changes_between_plan_and_run_fails_the_step(change, file, tmp_path):
    before = ExecutorStep("before", lambda config: change(file) and None, None)
    new = str(tmp_path / "new.txt")
    step = ExecutorStep("infer", read, Config([before, versioned(Prompts(str(file))), Prompts(new)]))
    with pytest.raises(StepFailedError, match=rf"{tmp_path}/\S+ changed after this job made its plan\. Start the job"):
        Executor(str(tmp_path / "runs")).run([step])


def test_a_nan_beside_a_path_does_not_count_as_a_change(file, tmp_path):
    step = ExecutorStep("infer", read, Config(versioned([Prompts(str(file)), np.float64("nan")])))
    assert [result.action for result in Executor(str(tmp_path / "runs")).run([step])] == ["RUN"]


def test_the_step_function_gets_the_path(file, tmp_path):
    seen: list[str] = []

    def keep(config: Any) -> None:
        seen.extend([config["a"], config["b"].path])

    config = {"a": content_of(str(file)), "b": versioned(Prompts(str(file)))}
    Executor(str(tmp_path / "runs")).run([ExecutorStep("reads", keep, config)])
    assert seen == [str(file)] * 2
    assert read_text(seen[0]) == CHECKED.decode()
