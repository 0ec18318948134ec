"""infer writes one row per sample, from a live trainer or from a model folder, and leaves both as they were."""

import dataclasses

import pytest

from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.errors import CapacityError, ConfigError, CoordinationError, DataError
from simpo_pipeline.executor.processes import Processes
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.storage.files import list_files, read_json
from simpo_pipeline.storage.jsonl import read_jsonl
from simpo_pipeline.training.config import OptimizerConfig
from steps.infer import InferConfig, check_same_tokens, infer
from steps.rows import host_file, merge_rows, merged_file, write_rows
from steps.train import TrainConfig, train

PROMPTS = ("one?", "two, please", "and a third prompt")


def config_for(model_path, output_path, **options):
    fields = {
        "prompts": PromptsConfig(prompts=PROMPTS),
        "sampling": SamplingParams(max_tokens=6, temperature=1.0),
        "engine": EngineConfig(max_seqs=4, max_seq_len=96),
    }
    return InferConfig(model_path=model_path, output_path=str(output_path), **{**fields, **options})


def rows_of(output_path):
    return list(read_jsonl(f"{output_path}/host_0000_of_0001.jsonl"))


def test_every_prompt_has_a_row_with_all_its_fields(model_path, step_run, tmp_path):
    infer(config_for(model_path, tmp_path, step=2), step_run)
    rows = rows_of(tmp_path)
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert [row["global_prompt_index"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert (row["step"], row["process_index"], row["process_count"], row["sample_index"]) == (2, 0, 1, 0)
        assert len(row["generated_tokens"]) == row["generated_token_count"]
        assert row["finish_reason"] == "stop" or row["generated_token_count"] == 6
    assert list(read_jsonl(f"{tmp_path}/all_hosts_merged_of_0001.jsonl")) == rows


def test_the_summary_counts_what_the_rows_hold(model_path, step_run, tmp_path):
    infer(config_for(model_path, tmp_path), step_run)
    rows, summary = rows_of(tmp_path), read_json(f"{tmp_path}/summary.json")
    assert (summary["prompts"], summary["rows"]) == (3, 3)
    assert summary["generated_tokens"] == summary["tokens"] == sum(row["generated_token_count"] for row in rows)
    assert summary["prompt_tokens"] == sum(row["prompt_token_count"] for row in rows)
    assert min(summary["prefill_seconds"], summary["decode_seconds"], summary["tokens_per_second"]) > 0


def test_samples_of_one_prompt_differ_and_the_seed_repeats_them(model_path, step_run, tmp_path):
    for name in ("a", "b"):
        infer(config_for(model_path, tmp_path / name, samples_per_prompt=2), step_run)
    rows = rows_of(tmp_path / "a")
    assert [(row["global_prompt_index"], row["sample_index"]) for row in rows[:3]] == [(0, 0), (0, 1), (1, 0)]
    assert rows[0]["generated_tokens"] != rows[1]["generated_tokens"]
    assert [row["generated_tokens"] for row in rows] == [row["generated_tokens"] for row in rows_of(tmp_path / "b")]


def test_a_borrowed_trainer_is_generated_from_and_left_as_it_was(
    model_path, pairs_path, trainer_config, step_run, tmp_path
):
    # Updates this large leave no doubt whose parameters answer.
    large = dataclasses.replace(trainer_config, optimizer=OptimizerConfig(learning_rate=0.1))
    stretch = TrainConfig(
        trainer=large,
        model_path=model_path,
        pairs_path=pairs_path,
        stop_step=3,
        output_path=str(tmp_path / "train"),
    )
    live = train(stretch, step_run)
    for name, trainer in (("live", live.value), ("file", None)):
        infer(config_for(model_path, tmp_path / name, trainer=trainer), step_run)
    assert live.value.digest() == live.digest
    assert [row["generated_tokens"] for row in rows_of(tmp_path / "live")] != [
        row["generated_tokens"] for row in rows_of(tmp_path / "file")
    ]


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_written(model_path, step_run, tmp_path):
    long = PromptsConfig(prompts=("short", "x" * 200))
    with pytest.raises(CapacityError, match=r"request 1 .*max_seq_len is 96"):
        infer(config_for(model_path, tmp_path, prompts=long), step_run)
    assert list_files(str(tmp_path)) == []


def test_an_engine_for_longer_sequences_than_the_models_is_refused(model_path, step_run, tmp_path):
    with pytest.raises(CapacityError, match=r"engine.max_seq_len is 129.*up to 128 tokens"):
        infer(config_for(model_path, tmp_path, engine=EngineConfig(max_seqs=4, max_seq_len=129)), step_run)


def test_in_one_process_one_engine_over_all_devices_is_the_same(model_path, step_run, tmp_path):
    for mode in ("host_data_parallel", "global_mesh"):
        infer(config_for(model_path, tmp_path / mode, mode=mode), step_run)
    assert rows_of(tmp_path / "global_mesh") == rows_of(tmp_path / "host_data_parallel")


def test_hosts_that_drew_other_tokens_from_one_engine_are_told(model_path, step_run, tmp_path):
    def hear_another(digest):
        return [digest, "of other tokens"]

    two = Processes(process_index=0, process_count=2, gather=hear_another)
    with pytest.raises(CoordinationError, match="gave process 1 other tokens than process 0"):
        check_same_tokens(two, [])


def write_shards(folder, shards):
    for host, prompts in enumerate(shards):
        rows = [{"process_index": host, "global_prompt_index": prompt, "sample_index": 0} for prompt in prompts]
        write_rows(f"{folder}/{host_file(host, len(shards))}", rows)


@pytest.mark.parametrize("shards", [[[0, 1], [2, 3, 4]], [[], [0], [1]], [[], [], []]])
def test_rows_of_uneven_and_empty_shards_are_merged_in_order(tmp_path, shards):
    write_shards(tmp_path, shards)
    count = sum(map(len, shards))
    assert [row["global_prompt_index"] for row in merge_rows(str(tmp_path), count, 1, len(shards))] == [*range(count)]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([[0, 1], [2]], r"host_0001_of_0002.jsonl: expected 2 sequences but got 1"),
        ([[0, 1], [2, 3, 4]], r"row 2 is \(process, prompt, sample\) \(1, 4, 0\), expected no more"),
        ([[0, 2], [1, 3]], r"host_0000_of_0002.jsonl: row 1 is .* \(0, 2, 0\), expected \(0, 1, 0\)"),
    ],
)
def test_rows_that_are_not_those_of_their_shard_are_refused(tmp_path, shards, message):
    write_shards(tmp_path, shards)
    with pytest.raises(DataError, match=message):
        list(merge_rows(str(tmp_path), 4, 1, 2))


def test_rows_of_an_attempt_by_another_number_of_hosts_are_removed(model_path, step_run, tmp_path):
    write_shards(tmp_path, [[0], [1]])
    write_rows(f"{tmp_path}/{merged_file(2)}", [])
    infer(config_for(model_path, tmp_path), step_run)
    names = {entry.relative_path for entry in list_files(str(tmp_path))}
    assert names == {host_file(0, 1), merged_file(1), "summary.json"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mode": "everywhere"},
            "Unknown inference_mode='everywhere'. Expected one of: host_data_parallel,",
        ),
        ({"samples_per_prompt": 0}, "samples_per_prompt must be at least 1, got 0"),
    ],
)
def test_a_wrong_config_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        config_for("model", "out", **fields)
