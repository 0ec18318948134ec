"""prepare_pairs turns records into a tokenised output and counts the pairs that did not fit."""

import json

import pytest

from simpo_pipeline.data.byte_tokenizer import write_byte_tokenizer
from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.data.pairs import read_pairs
from simpo_pipeline.errors import DataError
from simpo_pipeline.storage.files import read_json
from simpo_pipeline.storage.output_folder import OutputFolder
from steps.prepare_pairs import PreparePairsConfig, prepare_pairs


def record(prompt, chosen, rejected):
    def conversation(answer):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    return {"prompt": prompt, "chosen": conversation(chosen), "rejected": conversation(rejected)}


RECORDS = [record("2+2?", "4", "5"), record("Capital of France?", "Paris", "Lyon, I believe, but ask someone else.")]


@pytest.fixture
def prepare(tmp_path):
    write_byte_tokenizer(str(tmp_path / "model"))
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in RECORDS))

    def run(max_length=128, **options):
        config = PreparePairsConfig(
            source=PreferenceSource(path=str(source)),
            model_path=str(tmp_path / "model"),
            max_length=max_length,
            **options,
        )
        prepare_pairs(config, OutputFolder(str(tmp_path / "out")))
        return read_pairs(str(tmp_path / "out" / "pairs.parquet")), read_json(str(tmp_path / "out" / "summary.json"))

    return run


def test_the_prompt_is_shared_and_the_answers_are_the_models_own_tokens(prepare):
    pairs, summary = prepare()
    assert summary["num_pairs"] == len(pairs) == 2
    first = pairs[0]
    start = first.chosen_response_start
    assert bytes(first.chosen_tokens[start : start + 1].tolist()) == b"4"
    assert first.chosen_tokens[:start].tolist() == first.rejected_tokens[: first.rejected_response_start].tolist()


def test_too_long_pairs_are_dropped_and_counted(prepare):
    pairs, summary = prepare(max_length=60, too_long="drop")
    assert len(pairs) == summary["num_pairs"] == 1
    assert summary["num_dropped_too_long"] == 1


def test_too_long_pairs_are_cut_and_counted(prepare):
    pairs, summary = prepare(max_length=70, too_long="truncate")
    assert summary["num_truncated"] == 1
    assert max(pair.longest for pair in pairs) <= 70


def test_too_long_pairs_are_an_error_by_default(prepare):
    with pytest.raises(DataError, match="raise max_length, or set too_long"):
        prepare(max_length=60)


def test_held_out_pairs_are_in_a_separate_file_and_not_trained_on(prepare, tmp_path):
    everything, _ = prepare()
    training, summary = prepare(validation_fraction=0.5)
    held_out = read_pairs(str(tmp_path / "out" / "validation.parquet"))
    assert (summary["num_training"], summary["num_validation"]) == (len(training), len(held_out)) == (1, 1)
    assert {pair.prompt_id for pair in training + held_out} == {pair.prompt_id for pair in everything}
