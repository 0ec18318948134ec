"""train runs its phase of the run, writes a row per update, and hands on a live trainer that it can resume from."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from simpo_pipeline.data.pairs import read_pairs, write_pairs
from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.errors import ConfigError, DataError, LiveEdgeError
from simpo_pipeline.executor.step import ExecutorStep, borrow, output_path_of, take, versioned
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.job.session import JobSession
from simpo_pipeline.storage.files import open_write, read_json
from simpo_pipeline.storage.jsonl import read_jsonl
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.training.config import TrainerConfig
from steps.export import ExportConfig
from steps.infer import InferConfig
from steps.train import TrainConfig, WeightedPairs, train

TRAINER = TrainerConfig(num_train_steps=3, train_batch_size=2, train_seq_len=96)
PROMPTS = PromptsConfig(prompts=("one?",))


def write_file(path, pairs):
    with open_write(path) as file:
        write_pairs(file, pairs)


@pytest.fixture
def run_phase(model_path, pairs_path, trainer_config, step_run, tmp_path):
    def run(stop_step, live=None, trainer=trainer_config, pairs_path=pairs_path, run=step_run, **options):
        output_path = str(tmp_path / f"to-{stop_step}")
        config = TrainConfig(
            trainer=trainer,
            model_path=model_path,
            pairs_path=pairs_path,
            stop_step=stop_step,
            live=live,
            **options,
        )
        published = train(config, dataclasses.replace(run, output=OutputFolder(output_path)))
        rows = list(read_jsonl(f"{output_path}/metrics.jsonl"))
        return published, rows, read_json(f"{output_path}/summary.json")

    return run


def test_two_phases_give_the_state_of_one(run_phase):
    first, first_rows, first_summary = run_phase(1)
    assert first_summary["step"] == 1
    assert first_summary["state_digest"] == first.digest
    second, second_rows, second_summary = run_phase(3, live=first.value)
    assert second.value is first.value
    assert [row["step"] for row in first_rows + second_rows] == [1, 2, 3]
    assert (second_summary["first_step"], second_summary["step"]) == (2, 3)
    whole, whole_rows, whole_summary = run_phase(3)
    assert whole_summary["state_digest"] == second_summary["state_digest"] == whole.digest
    assert [row["loss"] for row in whole_rows] == [row["loss"] for row in first_rows + second_rows]


def test_the_summary_adds_up_the_rows(run_phase):
    _, rows, summary = run_phase(2)
    assert summary["tokens"] == sum(row["tokens"] for row in rows)
    assert summary["loss"] == rows[-1]["loss"]
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["train_seconds"], rel=0.01)


def test_a_trainer_of_another_run_is_refused(run_phase, trainer_config):
    first, _, _ = run_phase(1)
    with pytest.raises(ConfigError, match="live trainer belongs to another run"):
        run_phase(2, live=first.value, trainer=dataclasses.replace(trainer_config, seed=1))
    with pytest.raises(ConfigError, match="stop_step is 1, but the live trainer has finished 1 updates; expected 2 to"):
        run_phase(1, live=first.value)


@pytest.mark.parametrize(
    ("stop_step", "trainer", "message"),
    [
        (2, TRAINER, "stop_step is 2, but the live trainer has finished 2 updates; expected 3 to 3"),
        (versioned(1), TRAINER, "stop_step is 1, but the live trainer has finished 2 updates"),
        (3, versioned(dataclasses.replace(TRAINER, seed=1)), "the live trainer belongs to another run"),
    ],
)
def test_a_phase_that_cannot_follow_the_one_before_is_refused_in_the_plan(stop_step, trainer, message):
    before = ExecutorStep("train-2", train, TrainConfig(versioned(TRAINER), "model", "pairs", versioned(2)))
    TrainConfig(TRAINER, "model", "pairs", 3, live=take(before))
    with pytest.raises(ConfigError, match=message):
        TrainConfig(trainer, "model", "pairs", stop_step, live=take(before))


@pytest.mark.parametrize(
    ("config", "use", "allowed"),
    [
        (lambda live: TrainConfig(TRAINER, "model", "pairs", 2, live=live), borrow, "take"),
        (lambda live: TrainConfig(TRAINER, "model", "pairs", 2, live=live), output_path_of, "take"),
        (lambda live: InferConfig(PROMPTS, SamplingParams(), EngineConfig(), "model", trainer=live), take, "borrow"),
        (lambda live: ExportConfig(live, "model"), take, "borrow"),
        (lambda live: ExportConfig(live, "model"), lambda step: step, "borrow"),
    ],
)
def test_a_live_value_that_is_used_in_another_way_than_the_step_does_is_refused_in_the_plan(config, use, allowed):
    with pytest.raises(LiveEdgeError, match=rf"but only {allowed}\(.*\) is allowed there"):
        config(use(ExecutorStep("train-1", train, None)))


@pytest.mark.parametrize("stop_step", [0, 4])
def test_a_stop_outside_the_run_is_refused_before_anything_runs(run_phase, stop_step):
    with pytest.raises(ConfigError, match=f"stop_step is {stop_step}; expected 1 to 3, the updates of the run"):
        run_phase(stop_step)


def test_held_out_pairs_are_evaluated_before_the_first_update_periodically_and_after_the_last(
    run_phase, tmp_path, pairs_path
):
    plain, _, _ = run_phase(3)
    first, _, _ = run_phase(1, eval_every=2)
    assert evaluated_after(tmp_path / "to-1") == [0]
    second, _, _ = run_phase(3, live=first.value, eval_every=2)
    assert evaluated_after(tmp_path / "to-3") == [2, 3], "the evaluation of the previous phase must not be repeated"
    assert second.digest == plain.digest, "an evaluation must not change the state"
    row = next(read_jsonl(str(tmp_path / "to-3" / "evaluations.jsonl")))
    held_out = len(read_pairs(f"{pairs_path}/validation.parquet"))
    assert row["pairs"] == len(row["margins"]) == held_out
    assert {row["pairs_digest"]} == {
        earlier["pairs_digest"] for earlier in read_jsonl(str(tmp_path / "to-1" / "evaluations.jsonl"))
    }
    positive = sum(margin > 0 for margin in row["margins"]) / held_out
    assert row["accuracy"]["value"] == positive
    assert row["accuracy"]["low"] < positive < row["accuracy"]["high"] or positive in (0, 1)
    assert row["rewards/accuracies"] == pytest.approx(positive)


def pairs_file(folder):
    return f"{folder}/pairs.parquet"


def evaluated_after(output):
    return [row["step"] for row in read_jsonl(str(output / "evaluations.jsonl"))]


def test_an_evaluation_without_held_out_pairs_is_refused_before_a_device_is_touched(
    run_phase, tmp_path, pairs_path, monkeypatch
):
    copied = tmp_path / "without"
    shutil.copytree(pairs_path, copied)
    (copied / "validation.parquet").unlink()
    monkeypatch.setattr("steps.bodies.train._start", None)
    with pytest.raises(ConfigError, match=r"no validation\.parquet in .*: set validation_fraction"):
        run_phase(1, pairs_path=str(copied), eval_every=1)


def test_a_token_outside_the_vocabulary_is_refused_before_a_device_is_touched(
    run_phase, pairs_path, tmp_path, monkeypatch
):
    pairs = read_pairs(pairs_file(pairs_path))
    foreign = dataclasses.replace(pairs[1], chosen_tokens=pairs[1].chosen_tokens + 264)
    (tmp_path / "foreign").mkdir()
    write_file(pairs_file(tmp_path / "foreign"), [pairs[0], foreign])
    monkeypatch.setattr("steps.bodies.train._start", None)
    with pytest.raises(
        DataError, match=r"contains token .*, but the model knows tokens 0 to 263; prepare the pairs with"
    ):
        run_phase(1, pairs_path=str(tmp_path / "foreign"))


@pytest.mark.parametrize("file", ["pairs.parquet", "validation.parquet"])
def test_a_pair_too_long_for_the_run_is_refused_before_a_device_is_touched(
    run_phase, pairs_path, tmp_path, trainer_config, monkeypatch, file
):
    folder = tmp_path / "long"
    shutil.copytree(pairs_path, folder)
    pairs = read_pairs(f"{folder}/{file}")
    tokens = np.concatenate([pairs[0].chosen_tokens, np.ones(96, np.int32)])
    write_file(f"{folder}/{file}", [*pairs[1:], dataclasses.replace(pairs[0], chosen_tokens=tokens)])
    monkeypatch.setattr("steps.bodies.train._start", None)
    with pytest.raises(DataError, match=f"{pairs[0].prompt_id}' has {len(tokens)} tokens, more than seq_len 96"):
        run_phase(1, pairs_path=str(folder), eval_every=1)


def test_several_datasets_are_read_by_weight(run_phase, pairs_path, tmp_path, trainer_config):
    renamed = tmp_path / "others"
    others = [
        dataclasses.replace(pair, prompt_id=f"other-{i}") for i, pair in enumerate(read_pairs(pairs_file(pairs_path)))
    ]
    renamed.mkdir()
    write_file(pairs_file(renamed), others)
    both = (WeightedPairs(pairs_path, 3.0), WeightedPairs(str(renamed), 1.0))
    published, rows, _ = run_phase(3, pairs_path=both)
    _, alone, _ = run_phase(3)
    assert published.value.step == 3
    assert [row["loss"] for row in rows] != [row["loss"] for row in alone]
    with pytest.raises(ConfigError, match="weight of here is 0"):
        WeightedPairs("here", 0)
    with pytest.raises(ConfigError, match="pairs_path is empty"):
        TrainConfig(trainer_config, "model", (), 1)


@pytest.mark.slow
def test_the_profiled_update_writes_a_trace_and_changes_no_result(run_phase, session, monkeypatch, tmp_path):
    plain, _, _ = run_phase(3)
    monkeypatch.setattr(session, "profile", 2)
    traced, _, _ = run_phase(3)
    assert traced.digest == plain.digest
    (trace,) = (tmp_path / "to-3" / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = [event.name for plane in planes for line in plane.lines for event in line.events]
    assert len([name for name in names if name.startswith("$trainer.py") and name.endswith(" _update")]) == 1


def test_a_profile_of_an_update_that_does_not_run_is_refused_or_reported(
    run_phase, session, step_run, monkeypatch, caplog
):
    monkeypatch.setattr(session, "profile", 4)
    monkeypatch.setattr("steps.bodies.train._start", None)
    with pytest.raises(ConfigError, match="--profile is 4; expected 1 to 3, the updates of the run"):
        run_phase(3)
    skipped = JobSession(profile=2)
    skipped.close(None)
    assert caplog.messages == ["--profile 2: this job did not run that update, so there is no trace"]
