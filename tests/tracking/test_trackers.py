"""Every tracker fulfills the same contract, which is checked by reading back what it wrote."""

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from simpo_pipeline.errors import ConfigError, DataError
from simpo_pipeline.storage.jsonl import read_jsonl
from simpo_pipeline.tracking.factory import make_tracker
from simpo_pipeline.tracking.jsonl import JsonlTracker
from simpo_pipeline.tracking.tracker import NoTracker, Tracker
from simpo_pipeline.tracking.wandb import WandbTracker


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Run wandb as on a machine without network or account, with all its files below tmp_path."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(tmp_path),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "NETRC": str(tmp_path / "netrc"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()  # otherwise it reads the environment only once per process


@pytest.fixture(params=["wandb", "jsonl", "none"])
def open_tracker(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Tracker]:
    """Return a function that opens one tracker of each kind through the public API."""

    def open_it() -> Tracker:
        return make_tracker(
            request.param, jsonl_path=str(tmp_path / "tracker.jsonl"), project="test", run_name="m11", config={"a": 1}
        )

    return open_it


def wandb_records(folder: Path) -> list[Any]:
    """Return all records of the only offline run below `folder`.

    A .wandb file is a 7-byte header followed by a LevelDB log: blocks of 32 KiB with chunks of checksum, size and kind
    (1 whole, 2 first, 3 middle, 4 last), as documented by wandb, which no longer ships a reader for it.
    """
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    data = path.read_bytes()
    assert data.startswith(b":W&B")

    def chunks() -> Iterator[bytes]:
        position, record = 7, b""
        while position + 7 <= len(data):
            left_in_block = 32768 - position % 32768
            if left_in_block < 7:
                position += left_in_block
                continue
            _, size, kind = struct.unpack_from("<IHB", data, position)
            record += data[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):
                yield record
                record = b""

    return [cast(Any, wandb_internal_pb2).Record.FromString(chunk) for chunk in chunks()]


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    return [items(record.history.item) for record in wandb_records(folder) if record.HasField("history")]


def wandb_summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for record in wandb_records(folder):
        if record.HasField("summary"):
            summary |= items(record.summary.update)
    return summary


def test_every_tracker_offers_the_whole_protocol(open_tracker: Callable[[], Tracker]):
    tracker = open_tracker()
    assert isinstance(tracker, Tracker)
    tracker.log({"train/loss": 1.0, "train/tokens": 128}, step=1)
    tracker.log_samples([{"prompt": "p", "generated_text": "g"}], step=1)
    tracker.summary({"loss": 0.5, "state_digest": "ab"})
    tracker.finish()
    tracker.finish()


@pytest.mark.parametrize("value", [jnp.zeros(()), np.float32(1), "1.0", None, True], ids=lambda v: type(v).__name__)
def test_every_tracker_refuses_what_is_not_a_python_number_by_name(open_tracker: Callable[[], Tracker], value: Any):
    tracker = open_tracker()
    metrics: dict[str, Any] = {"train/fine": 1.0, "train/loss": value}
    with pytest.raises(DataError, match=r"metric 'train/loss' is .*, expected a Python int or float"):
        tracker.log(metrics, step=1)
    tracker.finish()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_tracker_refuses_a_metric_that_is_not_finite_by_name(open_tracker: Callable[[], Tracker], value: float):
    tracker = open_tracker()
    with pytest.raises(DataError, match=r"metric 'train/loss' is -?(nan|inf), but metrics must be finite"):
        tracker.log({"train/fine": 1.0, "train/loss": value}, step=1)
    tracker.finish()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_tracker_refuses_samples_and_final_values_that_are_not_finite_by_name(
    open_tracker: Callable[[], Tracker], value: float, tmp_path: Path
):
    tracker = open_tracker()
    with pytest.raises(DataError, match=r"(samples|rows)\[1\]\.logprobs\[0\] is (nan|inf) and cannot be written to"):
        tracker.log_samples([{"logprobs": [-1.0]}, {"logprobs": [value]}], step=1)
    with pytest.raises(DataError, match=r"\.train/loss is (nan|inf) and cannot be written to"):
        tracker.summary({"train/fine": 1.0, "train/loss": value})
    tracker.finish()
    assert not any(word in path.read_bytes() for path in tmp_path.rglob("*.json*") for word in (b"NaN", b"Infinity"))


def test_wandb_drops_no_metric_when_steps_come_out_of_order(tmp_path: Path):
    tracker = WandbTracker(project="test", name="m11")
    for step in (2, 1, 7, 3):
        tracker.log({"train/loss": step / 10, "train/rewards/chosen": -step}, step=step)
    tracker.log({"infer/tokens_per_second": 99.0}, step=2)
    tracker.finish()
    rows = wandb_history(tmp_path)
    assert [(row["train/step"], row["train/loss"], row["train/rewards/chosen"]) for row in rows[:4]] == [
        (2, 0.2, -2),
        (1, 0.1, -1),
        (7, 0.7, -7),
        (3, 0.3, -3),
    ]
    assert (rows[4]["infer/step"], rows[4]["infer/tokens_per_second"]) == (2, 99.0)
    assert len(rows) == 5


def test_wandb_plots_each_group_over_its_own_steps(tmp_path: Path):
    tracker = WandbTracker(project="test", name="m11")
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.log({"loss": 1.0, "tokens": 2}, step=1)
    tracker.finish()
    declared = [record.metric for record in wandb_records(tmp_path) if record.HasField("metric")]
    axes = {metric.glob_name or metric.name: metric.step_metric for metric in declared}
    assert axes == {"train/step": "", "train/*": "train/step", "step": "", "loss": "step", "tokens": "step"}


def test_wandb_keeps_a_whole_job_in_one_run_with_its_settings_and_summary(tmp_path: Path):
    tracker = WandbTracker(project="project", name="m11", config={"num_train_steps": 7})
    for step in range(1, 8):
        tracker.log({"train/loss": 1.0}, step=step)
    tracker.log_samples([{"prompt": "p", "generated_text": "g"}, {"prompt": "q", "other": 1}], step=2)
    tracker.summary({"state_digest": "ab", "loss": 2.0})
    tracker.summary({"loss": 1.0})
    tracker.finish()
    [run] = [record.run for record in wandb_records(tmp_path) if record.HasField("run")]
    assert (run.project, run.display_name) == ("project", "m11")
    assert json.loads(next(entry.value_json for entry in run.config.update if entry.key == "num_train_steps")) == 7
    summary = wandb_summary(tmp_path)
    assert (summary["state_digest"], summary["loss"]) == ("ab", 1.0)
    [table] = tmp_path.glob("wandb/offline-run-*/files/media/table/samples/*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["prompt", "generated_text", "other"],
        "data": [["p", "g", None], ["q", None, 1]],
    }


@pytest.mark.parametrize(("error", "exit_code"), [(None, 0), (RuntimeError("out of pages"), 1)])
def test_wandb_marks_a_run_failed_by_what_ended_the_job(tmp_path: Path, error: Exception | None, exit_code: int):
    tracker = WandbTracker(project="test", name="m11")
    tracker.finish(error)
    [ended] = [record.exit for record in wandb_records(tmp_path) if record.HasField("exit")]
    assert ended.exit_code == exit_code
    assert wandb_summary(tmp_path).get("error") == ("RuntimeError: out of pages" if error else None)


def test_wandb_leaves_a_run_that_the_caller_has_open_alone(tmp_path: Path):
    own = wandb.init(project="own", dir=str(tmp_path / "own"))
    tracker = WandbTracker(project="test", name="m11")
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.finish()
    own.log({"own": 2.0})
    own.finish()
    wandb.teardown()
    assert [row["own"] for row in wandb_history(tmp_path / "own")] == [2.0]
    assert [row["train/loss"] for row in wandb_history(tmp_path)] == [1.0]


def test_wandb_without_login_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match=r"project 'test': .* Run `wandb login`, or set WANDB_MODE=offline"):
        WandbTracker(project="test", name="m11")


def test_jsonl_records_every_call_in_order(tmp_path: Path):
    tracker = JsonlTracker(str(tmp_path / "tracker.jsonl"))
    tracker.log({"train/loss": 0.5}, step=2)
    tracker.log({"train/loss": 0.6}, step=1)
    tracker.log_samples([{"prompt": "p"}], step=2)
    tracker.summary({"state_digest": "ab"})
    tracker.finish()
    rows = list(read_jsonl(str(tmp_path / "tracker.jsonl")))
    assert [{name: value for name, value in row.items() if name != "time"} for row in rows] == [
        {"kind": "metrics", "step": 2, "metrics": {"train/loss": 0.5}},
        {"kind": "metrics", "step": 1, "metrics": {"train/loss": 0.6}},
        {"kind": "samples", "step": 2, "rows": [{"prompt": "p"}]},
        {"kind": "summary", "values": {"state_digest": "ab"}},
        {"kind": "finish", "state": "finished"},
    ]


def test_jsonl_is_readable_to_the_last_line_while_the_job_runs(tmp_path: Path):
    tracker = JsonlTracker(str(tmp_path / "tracker.jsonl"))
    tracker.log({"train/loss": 0.5}, step=1)
    [row] = read_jsonl(str(tmp_path / "tracker.jsonl"))
    assert row["metrics"] == {"train/loss": 0.5}
    tracker.finish()


def test_jsonl_marks_a_record_failed_by_what_ended_the_job(tmp_path: Path):
    tracker = JsonlTracker(str(tmp_path / "tracker.jsonl"))
    tracker.finish(RuntimeError("out of pages"))
    [row] = read_jsonl(str(tmp_path / "tracker.jsonl"))
    assert (row["state"], row["error"]) == ("failed", "RuntimeError: out of pages")


def test_an_unknown_tracker_is_refused_naming_the_known_ones():
    with pytest.raises(ConfigError, match="tracker 'tensorboard' is unknown; choose one of wandb, jsonl, none"):
        make_tracker("tensorboard", jsonl_path="x", project="p", run_name="r")


def test_none_means_no_tracker():
    assert isinstance(make_tracker("none", jsonl_path="x", project="p", run_name="r"), NoTracker)


def test_wandb_is_imported_by_its_own_tracker_only(tmp_path: Path):
    code = (
        "import sys; from simpo_pipeline.tracking.factory import make_tracker; "
        "tracker = make_tracker('jsonl', jsonl_path=sys.argv[1], project='p', run_name='r'); tracker.finish(); "
        "print([name for name in ('wandb', 'jax') if name in sys.modules])"
    )
    path = str(tmp_path / "t.jsonl")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
