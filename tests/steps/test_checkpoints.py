"""A stopped training step resumes from its newest checkpoint and reaches the state of one that never stopped."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

from simpo_pipeline.data.pairs import read_pairs, write_pairs
from simpo_pipeline.errors import ConfigError, StorageError, TrainingError
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.processes import Processes
from simpo_pipeline.storage.files import open_write
from simpo_pipeline.storage.jsonl import read_jsonl
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.training.config import CheckpointConfig
from simpo_pipeline.training.trainer import Trainer
from steps.train import TrainConfig, train

NEVER = CheckpointConfig()
EVERY = CheckpointConfig("every", 1)
ON_FAILURE = CheckpointConfig("on_failure")


class Killed(BaseException):
    """Error with which a test stops a step; like a kill, nothing may handle it."""


@pytest.fixture
def run_train(model_path, pairs_path, trainer_config, session, tmp_path):
    """Return a function that runs the step in a folder of `tmp_path`, with a trainer that keeps a moving average."""

    def run(name, checkpoint=NEVER, *, stop_step=3, live=None, version="v", is_used_live=False, **changes):
        path = str(tmp_path / name)
        step_run = StepRun(
            *("step", OutputFolder(path), changes.pop("processes", Processes()), session, ()),
            replaying=changes.pop("replaying", False),
            recorded_path=str(tmp_path / changes.pop("recorded", name)),
            version=version,
            is_used_live=is_used_live,
        )
        config = TrainConfig(
            trainer=dataclasses.replace(trainer_config, ema_decay=0.5),
            model_path=model_path,
            pairs_path=changes.pop("pairs_path", pairs_path),
            stop_step=stop_step,
            live=live,
            checkpoint=checkpoint,
        )
        return train(config, step_run)

    return run


@pytest.fixture
def stop_in_update(monkeypatch):
    """Return a function that stops training in a given update with a given error."""

    def stop(number, error):
        update = Trainer._update

        def failing(self, loader, program):
            if self.step + 1 == number:
                raise error
            return update(self, loader, program)

        monkeypatch.setattr(Trainer, "_update", failing)
        return lambda: monkeypatch.setattr(Trainer, "_update", update)

    return stop


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the finished checkpoints: update -> the folder that orbax wrote."""
    records = [json.loads(path.read_text()) for path in (folder / ".checkpoints").glob("*.json")]
    return {record["step"]: folder / ".checkpoints" / record["name"] for record in records}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(str(folder / "metrics.jsonl"))]


def test_a_step_killed_in_its_third_update_resumes_from_the_second(run_train, stop_in_update, tmp_path):
    whole = run_train("whole")
    restore = stop_in_update(3, Killed())
    with pytest.raises(Killed):
        run_train("again", EVERY)
    restore()
    # A killed job records no checkpoint that was still being written; that of the first update exists.
    assert set(checkpoints(tmp_path / "again")) <= {1, 2} and checkpoints(tmp_path / "again")
    restore = stop_in_update(1, AssertionError("training started over"))
    resumed = run_train("again", EVERY)
    restore()
    assert resumed.digest == whole.digest
    assert resumed.value.state.ema is not None
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("again", "whole")]
    for name in ("first_step", "step", "tokens", "state_digest", "loss"):
        assert summaries[0][name] == summaries[1][name]


def test_a_phase_with_other_pairs_resumes_where_it_was_in_these_pairs(
    run_train, stop_in_update, pairs_path, tmp_path, monkeypatch
):
    others = tmp_path / "others"
    others.mkdir()
    with open_write(f"{others}/pairs.parquet") as file:
        write_pairs(file, read_pairs(f"{pairs_path}/pairs.parquet")[::-1])

    def phases(name, checkpoint=NEVER, **second):
        first = run_train(f"{name}-1", checkpoint, stop_step=1, is_used_live=True)
        return run_train(name, checkpoint, live=first.value, pairs_path=str(others), **second)

    whole = phases("whole", is_used_live=True)
    restore = stop_in_update(3, Killed())
    with pytest.raises(Killed):
        phases("again", EVERY, is_used_live=True)
    restore()
    restore = stop_in_update(1, AssertionError("training started over"))
    resumed = phases("again", EVERY, is_used_live=True)
    assert resumed.digest == whole.digest
    assert resumed.value.data_position == 4, "two updates of two pairs each"
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    restore()
    stop_in_update(3, AssertionError("the replay computed an update"))
    assert phases("scratch", EVERY, replaying=True, recorded="again").digest == whole.digest


def test_a_failed_step_leaves_the_state_before_the_update_that_failed(run_train, stop_in_update, tmp_path):
    whole = run_train("whole")
    restore = stop_in_update(3, ValueError("the third batch"))
    with pytest.raises(ValueError, match="the third batch"):
        run_train("again", ON_FAILURE)
    assert set(checkpoints(tmp_path / "again")) == {2}
    restore()
    assert run_train("again", ON_FAILURE).digest == whole.digest
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_update_stops_the_step_after_it_with_a_checkpoint(run_train, monkeypatch, tmp_path, number):
    class Terminated(BaseException):
        pass

    def terminate(number, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)  # by default the signal would kill the test itself
    update = Trainer._update

    def signalled(self, loader, program):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return update(self, loader, program)

    monkeypatch.setattr(Trainer, "_update", signalled)
    try:
        with pytest.raises((KeyboardInterrupt, Terminated)):
            run_train("stopped", ON_FAILURE)
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGTERM, before)
    assert set(checkpoints(tmp_path / "stopped")) == {2}


def test_a_failure_without_a_complete_state_leaves_no_checkpoint(run_train, monkeypatch, tmp_path):
    def losing(self, batch, program):
        self._lose_state("the device failed")
        raise RuntimeError("the device failed")

    monkeypatch.setattr(Trainer, "_advance", losing)
    with pytest.raises(RuntimeError, match="the device failed"):
        run_train("lost", ON_FAILURE)
    assert checkpoints(tmp_path / "lost") == {}


def test_the_requested_number_is_kept_and_incomplete_ones_are_removed(run_train, tmp_path):
    torn = tmp_path / "two" / ".checkpoints" / "00000002-torn"
    torn.mkdir(parents=True)
    (torn / "manifest.ocdbt").write_text("half of it")
    run_train("two", CheckpointConfig("every", 1, keep=2), is_used_live=True)
    found = checkpoints(tmp_path / "two")
    assert set(found) == {2, 3}  # a replay for the next phase starts from the last one
    assert not torn.exists()
    names = {path.name for path in (tmp_path / "two" / ".checkpoints").iterdir()}
    assert names == {path.name for path in found.values()} | {f"{path.name}.json" for path in found.values()}


def test_one_is_written_at_the_requested_interval(run_train, tmp_path):
    run_train("every_2", CheckpointConfig("every", 2, keep=3), is_used_live=True)
    assert set(checkpoints(tmp_path / "every_2")) == {2, 3}


def test_a_replay_loads_the_last_state_and_writes_none(run_train, stop_in_update, tmp_path):
    first = run_train("first", EVERY, stop_step=2, is_used_live=True)
    before = sorted(path.name for path in (tmp_path / "first" / ".checkpoints").iterdir())
    restore = stop_in_update(1, AssertionError("the phase was computed again"))
    again = run_train("aside", EVERY, stop_step=2, is_used_live=True, replaying=True, recorded="first")
    assert again.digest == first.digest
    assert again.value.step == 2
    assert sorted(path.name for path in (tmp_path / "first" / ".checkpoints").iterdir()) == before
    assert not (tmp_path / "aside" / ".checkpoints").exists()
    restore()
    assert run_train("second", live=again.value).digest == run_train("whole").digest


def test_a_phase_with_a_live_trainer_resumes_from_its_own_checkpoint(run_train, stop_in_update, tmp_path):
    restore = stop_in_update(3, ValueError("stopped"))
    with pytest.raises(ValueError, match="stopped"):
        run_train("second", ON_FAILURE, live=run_train("first", stop_step=1).value)
    restore()
    live = run_train("first", stop_step=1).value
    resumed = run_train("second", ON_FAILURE, live=live)
    assert resumed.value is live
    assert resumed.digest == run_train("whole").digest
    assert json.loads((tmp_path / "second" / "summary.json").read_text())["first_step"] == 2


def test_a_checkpoint_of_another_version_is_not_used(run_train, tmp_path):
    run_train("here", EVERY, stop_step=2, is_used_live=True, version="old")
    found = checkpoints(tmp_path / "here")
    assert run_train("here", EVERY, stop_step=2, is_used_live=True, version="new").value.step == 2
    assert checkpoints(tmp_path / "here") != found


def test_a_changed_state_is_refused_by_its_digest(run_train, tmp_path):
    run_train("here", EVERY, stop_step=2, is_used_live=True)
    ((_, folder),) = checkpoints(tmp_path / "here").items()
    path = folder.with_name(folder.name + ".json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"digest": "0" * 64}))
    with pytest.raises(TrainingError, match=r"contains a state with digest \w+, but 0+ was written.*Delete '.*json'"):
        run_train("here", EVERY, stop_step=2, is_used_live=True)


def test_missing_files_are_reported_with_what_to_delete(run_train, tmp_path):
    run_train("here", EVERY, stop_step=2, is_used_live=True)
    ((_, folder),) = checkpoints(tmp_path / "here").items()
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(
        StorageError, match=r"cannot be read .* restart the job, and if its files are lost, delete '.*json' first"
    ):
        run_train("here", EVERY, stop_step=2, is_used_live=True)


def test_a_checkpoint_of_other_devices_is_refused(run_train, tmp_path):
    run_train("here", EVERY, stop_step=2, is_used_live=True)
    ((_, folder),) = checkpoints(tmp_path / "here").items()
    path = folder.with_name(folder.name + ".json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"layout": "2 processes, {'data': 4, 'model': 1}"}))
    with pytest.raises(ConfigError, match=r"was written by 2 processes.*but this job has 1 processes"):
        run_train("here", EVERY, stop_step=2, is_used_live=True)


def test_on_failure_is_refused_with_many_processes_before_any_device_is_touched(run_train):
    with pytest.raises(ConfigError, match=r"'on_failure' in a job of 2 processes.*Use 'every'"):
        run_train(
            "here", ON_FAILURE, processes=Processes(0, 2, agree=lambda value: value, gather=lambda value: [value])
        )


def test_when_never_no_checkpoint_is_written(run_train, tmp_path):
    run_train("here", stop_step=1, is_used_live=True)
    assert not (tmp_path / "here" / ".checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("sometimes",), r"checkpoint\.when is 'sometimes': give one of never, every, on_failure"),
        (("every",), r"checkpoint\.when is 'every' and checkpoint\.every None"),
        (("never", 3), r"checkpoint\.when is 'never' and checkpoint\.every 3"),
        (("every", 0), r"checkpoint\.every is 0"),
        (("every", 1, 0), r"checkpoint\.keep is 0"),
    ],
)
def test_invalid_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        CheckpointConfig(*settings)
