"""train runs its stretch of the run, writes a row per update, and hands on a live trainer it can go on with."""

import dataclasses

import pytest

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.storage.files import read_json
from simpo_pipeline.storage.jsonl import read_jsonl
from steps.train import TrainConfig, train


@pytest.fixture
def run_stretch(model_path, pairs_path, trainer_config, step_run, tmp_path):
    def run(stop_step, live=None, trainer=trainer_config):
        output_path = str(tmp_path / f"to-{stop_step}")
        config = TrainConfig(
            trainer=trainer,
            model_path=model_path,
            pairs_path=pairs_path,
            stop_step=stop_step,
            live=live,
            output_path=output_path,
        )
        published = train(config, step_run)
        rows = list(read_jsonl(f"{output_path}/metrics.jsonl"))
        return published, rows, read_json(f"{output_path}/summary.json")

    return run


def test_two_stretches_give_the_state_of_one(run_stretch):
    first, first_rows, first_summary = run_stretch(1)
    assert first_summary["step"] == 1
    assert first_summary["state_digest"] == first.digest
    second, second_rows, second_summary = run_stretch(3, live=first.value)
    assert second.value is first.value
    assert [row["step"] for row in first_rows + second_rows] == [1, 2, 3]
    assert (second_summary["first_step"], second_summary["step"]) == (2, 3)
    whole, whole_rows, whole_summary = run_stretch(3)
    assert whole_summary["state_digest"] == second_summary["state_digest"] == whole.digest
    assert [row["loss"] for row in whole_rows] == [row["loss"] for row in first_rows + second_rows]


def test_the_summary_adds_up_the_rows(run_stretch):
    _, rows, summary = run_stretch(2)
    assert summary["tokens"] == sum(row["tokens"] for row in rows)
    assert summary["loss"] == rows[-1]["loss"]
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["train_seconds"], rel=0.01)


def test_a_trainer_of_another_run_is_refused(run_stretch, trainer_config):
    first, _, _ = run_stretch(1)
    with pytest.raises(ConfigError, match="live trainer is of another run"):
        run_stretch(2, live=first.value, trainer=dataclasses.replace(trainer_config, seed=1))


@pytest.mark.parametrize("stop_step", [0, 4])
def test_a_stop_outside_the_run_is_refused_before_anything_runs(run_stretch, stop_step):
    with pytest.raises(ConfigError, match=f"stop_step is {stop_step}, and the run has updates 1 to 3"):
        run_stretch(stop_step)
