"""infer writes one row per sample, from a live trainer or from a model folder, and leaves both unchanged."""

import dataclasses
import json
import math

import pytest

from simpo_pipeline.data.config import ChatConfig
from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.data.tokenize import PairStats
from simpo_pipeline.errors import CapacityError, ConfigError, CoordinationError, DataError
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.inference.generated_rows import read_finished_rows
from simpo_pipeline.inference.host_rows import HostRows
from simpo_pipeline.inference.row_files import host_file, merge_rows, merged_file, unfinished_file
from simpo_pipeline.inference.sequence import Completion, Request
from simpo_pipeline.processes import Processes
from simpo_pipeline.storage.files import list_files, read_json
from simpo_pipeline.storage.jsonl import JsonlWriter, read_jsonl
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.training.config import OptimizerConfig
from steps.bodies.infer import NOTES, check_same_tokens
from steps.infer import InferConfig, infer
from steps.train import TrainConfig, train

PROMPTS = ("one?", "two, please", "and a third prompt")
# Tests that do not vary the engine's sizes share this one, so that its programs are compiled once.
ENGINE = EngineConfig(max_seqs=3, max_seq_len=128, page_size=16, num_pages=24, prefill_chunk_tokens=128)


def config_for(model_path, **options):
    fields = {
        "prompts": PromptsConfig(prompts=PROMPTS),
        "sampling": SamplingParams(max_tokens=6, temperature=1.0),
        "engine": ENGINE,
    }
    return InferConfig(model_path=model_path, **{**fields, **options})


def at(folder, step_run):
    """Return the run with another output folder."""
    return dataclasses.replace(step_run, output=OutputFolder(str(folder)))


def rows_of(output_path):
    return list(read_jsonl(f"{output_path}/host_0000_of_0001.jsonl"))


def test_every_prompt_has_a_row_with_all_its_fields(model_path, step_run, tmp_path):
    infer(config_for(model_path, step=2), at(tmp_path, step_run))
    rows = rows_of(tmp_path)
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert [row["global_prompt_index"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert (row["step"], row["process_index"], row["process_count"], row["sample_index"]) == (2, 0, 1, 0)
        assert len(row["generated_tokens"]) == row["generated_token_count"]
        assert row["finish_reason"] == "stop" or row["generated_token_count"] == 6
    assert list(read_jsonl(f"{tmp_path}/all_hosts_merged_of_0001.jsonl")) == rows


def test_the_summary_matches_the_rows(model_path, step_run, tmp_path):
    infer(config_for(model_path), at(tmp_path, step_run))
    rows, summary = rows_of(tmp_path), read_json(f"{tmp_path}/summary.json")
    assert (summary["prompts"], summary["rows"]) == (3, 3)
    assert summary["generated_tokens"] == summary["tokens"] == sum(row["generated_token_count"] for row in rows)
    assert summary["prompt_tokens"] == sum(row["prompt_token_count"] for row in rows)
    assert min(summary["prefill_seconds"], summary["decode_seconds"], summary["tokens_per_second"]) > 0


def test_samples_of_one_prompt_differ_and_are_reproducible_by_seed(model_path, step_run, tmp_path):
    for name in ("a", "b"):
        sampling = SamplingParams(max_tokens=6, n=2)
        infer(config_for(model_path, sampling=sampling), at(tmp_path / name, step_run))
    rows = rows_of(tmp_path / "a")
    assert [(row["global_prompt_index"], row["sample_index"]) for row in rows[:3]] == [(0, 0), (0, 1), (1, 0)]
    assert rows[0]["generated_tokens"] != rows[1]["generated_tokens"]
    assert [row["generated_tokens"] for row in rows] == [row["generated_tokens"] for row in rows_of(tmp_path / "b")]


def test_a_borrowed_trainer_generates_and_is_left_unchanged(model_path, pairs_path, trainer_config, step_run, tmp_path):
    # Updates this large leave no doubt whose parameters generate.
    large = dataclasses.replace(trainer_config, optimizer=OptimizerConfig(learning_rate=0.1))
    phase = TrainConfig(
        trainer=large,
        model_path=model_path,
        pairs_path=pairs_path,
        stop_step=3,
    )
    live = train(phase, step_run)
    for name, trainer in (("live", live.value), ("file", None)):
        infer(config_for(model_path, trainer=trainer, step=3), at(tmp_path / name, step_run))
    with pytest.raises(ConfigError, match="step is 2, but the borrowed trainer has finished 3 updates"):
        infer(config_for(model_path, trainer=live.value, step=2), at(tmp_path / "live", step_run))
    assert live.value.digest() == live.digest
    assert [row["generated_tokens"] for row in rows_of(tmp_path / "live")] != [
        row["generated_tokens"] for row in rows_of(tmp_path / "file")
    ]


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_written(model_path, step_run, tmp_path):
    long = PromptsConfig(prompts=("short", "x" * 200))
    with pytest.raises(CapacityError, match=r"request 1 .*max_seq_len is 128"):
        infer(config_for(model_path, prompts=long), at(tmp_path, step_run))
    assert list_files(str(tmp_path)) == []


def test_a_max_seq_len_beyond_the_models_is_refused(model_path, step_run, tmp_path):
    with pytest.raises(CapacityError, match=r"engine.max_seq_len is 129.*up to 128 tokens"):
        infer(config_for(model_path, engine=EngineConfig(max_seqs=4, max_seq_len=129)), at(tmp_path, step_run))


def test_in_one_process_both_modes_give_the_same_rows(model_path, step_run, tmp_path):
    for mode in ("host_data_parallel", "global_mesh"):
        infer(config_for(model_path, mode=mode), at(tmp_path / mode, step_run))
    assert rows_of(tmp_path / "global_mesh") == rows_of(tmp_path / "host_data_parallel")


def test_hosts_that_drew_different_tokens_from_one_engine_are_reported():
    def check_both(*drawn):
        said = []
        completed = [
            [Completion(Request((1, 2), 0, 0, SamplingParams(max_tokens=3)), each, "length")] for each in drawn
        ]
        for each in completed:
            check_same_tokens(Processes(gather=lambda digest: [said.append(digest)]), each)
        check_same_tokens(Processes(process_index=0, process_count=2, gather=lambda digest: said), completed[0])

    check_both((5, 6, 7), (5, 6, 7))
    with pytest.raises(CoordinationError, match="returned different tokens to process 1 than to process 0"):
        check_both((5, 6, 7), (5, 6, 8))


def write_rows(path, rows):
    with JsonlWriter(str(path)) as file:
        for row in rows:
            file.write(row)


def write_shards(folder, shards):
    for host, prompts in enumerate(shards):
        rows = [{"process_index": host, "global_prompt_index": prompt, "sample_index": 0} for prompt in prompts]
        write_rows(folder / host_file(host, len(shards)), rows)


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
def test_rows_that_do_not_belong_to_their_shard_are_refused(tmp_path, shards, message):
    write_shards(tmp_path, shards)
    with pytest.raises(DataError, match=message):
        list(merge_rows(str(tmp_path), 4, 1, 2))


def test_rows_of_an_earlier_attempt_are_removed(model_path, step_run, tmp_path):
    write_shards(tmp_path, [[0], [1]])
    for name in (merged_file(2), unfinished_file(0, 1), unfinished_file(1, 2)):
        write_rows(tmp_path / name, [{"of": "an earlier attempt"}])
    infer(config_for(model_path), at(tmp_path, step_run))
    names = {entry.relative_path for entry in list_files(str(tmp_path))}
    assert names == {host_file(0, 1), merged_file(1), "summary.json"}


def test_a_wrong_mode_is_refused():
    with pytest.raises(ConfigError, match=r"Unknown inference_mode='everywhere'\. Expected one of: host_data_p"):
        config_for("model", mode="everywhere")


def test_a_step_without_a_seed_is_refused():
    with pytest.raises(ConfigError, match=r"sampling\.seed is None; set a seed"):
        config_for("model", sampling=SamplingParams(seed=None))


def test_a_bad_word_is_never_generated(model_path, step_run, tmp_path):
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logit_bias={ord("q"): 100})
    infer(config_for(model_path, sampling=sampling), at(tmp_path / "with", step_run))
    infer(
        config_for(model_path, sampling=dataclasses.replace(sampling, bad_words=("q",))),
        at(tmp_path / "without", step_run),
    )
    assert {row["generated_text"] for row in rows_of(tmp_path / "with")} == {"q" * 12}
    assert not any(ord("q") in row["generated_tokens"] for row in rows_of(tmp_path / "without"))


def test_rows_are_readable_while_others_are_still_generated(model_path, step_run, tmp_path, monkeypatch):
    """Every finished row is in the temporary file when the step fails; the next run leaves only the final files."""
    unfinished, seen = f"{tmp_path}/{unfinished_file(0, 1)}", []

    def fail_at_the_fifth_row(self, ended):
        add(self, ended)
        seen.append([(row["global_prompt_index"], row["generated_tokens"]) for row in read_finished_rows(unfinished)])
        if len(seen[-1]) >= 5:
            raise RuntimeError("a planted error")

    add = HostRows.add
    monkeypatch.setattr(HostRows, "add", fail_at_the_fifth_row)
    config = config_for(
        model_path,
        prompts=PromptsConfig(synthetic_prompt_count=12, synthetic_prompt_template="{index}?"),
    )
    with pytest.raises(RuntimeError, match="a planted error"):
        infer(config, step_run)
    assert 0 < len(seen[0]) < 12, "no row was streamed while others were still generated"
    streamed = [(row["global_prompt_index"], row["generated_tokens"]) for row in read_finished_rows(unfinished)]
    assert streamed == seen[-1]
    monkeypatch.undo()
    infer(config, step_run)
    final = [(row["global_prompt_index"], row["generated_tokens"]) for row in rows_of(tmp_path)]
    assert len(final) == 12 and set(map(repr, streamed)) <= set(map(repr, final))
    names = {entry.relative_path for entry in list_files(str(tmp_path))}
    assert names == {host_file(0, 1), merged_file(1), "summary.json"}


def test_a_stop_string_stops_a_sample_and_is_excluded_from_its_text(model_path, step_run, tmp_path):
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    infer(config_for(model_path, sampling=sampling), at(tmp_path / "whole", step_run))
    whole = rows_of(tmp_path / "whole")[0]["generated_text"]
    stop = next(text for at in range(2, 20) if "\ufffd" not in (text := whole[at : at + 3]))
    infer(config_for(model_path, sampling=dataclasses.replace(sampling, stop=(stop,))), at(tmp_path / "cut", step_run))
    row = rows_of(tmp_path / "cut")[0]
    assert row["finish_reason"] == "stop_string"
    assert row["generated_text"] == whole[: whole.index(stop)]
    assert row["generated_token_count"] == len(row["generated_tokens"]) < 24
    assert read_json(f"{tmp_path}/cut/summary.json")["finish_reasons"]["stop_string"] >= 1


@pytest.mark.parametrize(("ignore_eos", "reasons"), [(True, {"length"}), (False, {"length", "stop"})])
def test_the_tokenizers_end_tokens_stop_a_sample_unless_they_are_ignored(
    model_path, step_run, tmp_path, ignore_eos, reasons
):
    sampling = SamplingParams(max_tokens=64, n=12, ignore_eos=ignore_eos)
    infer(config_for(model_path, sampling=sampling), at(tmp_path, step_run))
    rows = rows_of(tmp_path)
    assert {row["finish_reason"] for row in rows} == reasons
    assert {row["generated_tokens"][-1] for row in rows if row["finish_reason"] == "stop"} <= {257, 260}


def test_custom_stop_tokens_are_added_to_those_of_the_tokenizer(model_path, step_run, tmp_path):
    sampling = SamplingParams(max_tokens=64, n=12, stop_token_ids=(100, 101))
    infer(config_for(model_path, sampling=sampling), at(tmp_path, step_run))
    ends = {row["generated_tokens"][-1] for row in rows_of(tmp_path) if row["finish_reason"] == "stop"}
    assert ends == {100, 101, 257, 260}


def test_rows_have_log_probabilities_only_when_requested(model_path, step_run, tmp_path):
    for asked in (None, 0, 3):
        infer(config_for(model_path, sampling=SamplingParams(6, logprobs=asked)), at(tmp_path / str(asked), step_run))
    without, chosen, top = (rows_of(tmp_path / name)[0] for name in ("None", "0", "3"))
    assert not {"logprobs", "cumulative_logprob", "top_logprobs"} & without.keys()
    assert chosen.keys() - without.keys() == {"logprobs", "cumulative_logprob"}
    assert chosen["logprobs"] == top["logprobs"] and len(chosen["logprobs"]) == chosen["generated_token_count"]
    assert all(-20 < each < 0 for each in chosen["logprobs"])
    assert math.isclose(chosen["cumulative_logprob"], sum(chosen["logprobs"]))
    for token, own, likeliest in zip(top["generated_tokens"], top["logprobs"], top["top_logprobs"], strict=True):
        assert len(likeliest) == 3 and likeliest == sorted(likeliest, key=lambda pair: -pair[1])
        assert dict(likeliest).get(token, own) == own


def test_prompts_that_the_model_reads_otherwise_than_written_are_counted_as_in_prepare_pairs(
    model_path, step_run, tmp_path
):
    config = config_for(
        model_path,
        prompts=PromptsConfig(prompts=("one?", "a <|im_end|> b", "<|im_start|>", "two, please")),
        sampling=SamplingParams(max_tokens=6, n=2),
    )
    with pytest.raises(DataError, match=r"prompt 1: message 0 \(user\) contains '<\|im_end\|>'"):
        infer(config, at(tmp_path, step_run))
    counted = dataclasses.replace(config, chat_config=ChatConfig(special_text="plain"))
    infer(counted, at(tmp_path, step_run))
    summary = read_json(f"{tmp_path}/summary.json")
    assert [summary[name] for name in ("num_special_text", "num_omitted_text", "num_unencodable_text")] == [2, 0, 0]
    assert summary["chat_config"]["special_text"] == "plain"
    assert set(NOTES) < {field.name for field in dataclasses.fields(PairStats)}


MANY = PromptsConfig(synthetic_prompt_count=1024, synthetic_prompt_template="{index}")
# Every sample has exactly 20 tokens, so that a truncated one would show.
FEW = SamplingParams(max_tokens=20, ignore_eos=True)


def tokens_of_every_row(output_path, num_prompts):
    rows = rows_of(output_path)
    assert [row["global_prompt_index"] for row in rows] == list(range(num_prompts))
    for row in rows:
        assert (row["finish_reason"], row["generated_token_count"], len(row["generated_tokens"])) == ("length", 20, 20)
    return [row["generated_tokens"] for row in rows]


@pytest.mark.slow
def test_1024_prompts_need_no_setting_and_none_is_dropped_or_truncated(model_path, step_run, tmp_path):
    config = config_for(model_path, prompts=MANY, sampling=FEW, engine=EngineConfig(), chat=False)
    infer(config, step_run)
    tokens_of_every_row(tmp_path, 1024)
    assert read_json(f"{tmp_path}/summary.json")["rows"] == 1024


@pytest.mark.slow
def test_engines_too_small_for_all_work_at_once_give_the_same_rows(model_path, step_run, tmp_path):
    prompts = PromptsConfig(synthetic_prompt_count=40, synthetic_prompt_template="prompt {index} of many")
    sizes = {
        "derived": EngineConfig(),
        # Few sequences, pages for two complete ones, a prefill smaller than a prompt, and a number of steps per call
        # that divides no length.
        "narrow": EngineConfig(max_seqs=3, page_size=8, num_pages=12, prefill_chunk_tokens=8, decode_steps_per_call=7),
    }
    found = {}
    for name, engine in sizes.items():
        fields = {"prompts": prompts, "sampling": FEW, "engine": engine, "chat": False}
        infer(config_for(model_path, **fields), at(tmp_path / name, step_run))
        found[name] = tokens_of_every_row(tmp_path / name, 40)
    assert all(tokens == found["derived"] for tokens in found.values())
    assert read_json(f"{tmp_path}/narrow/summary.json")["num_preemptions"] > 0


def beside_a_host(step_run, work, memory_bytes):
    """Return a run in which another host reports its work and memory."""

    def gather(value):
        reports_sizes = isinstance(value, dict) and "memory_bytes" in value
        return [value, {"work": work or value["work"], "memory_bytes": memory_bytes}] if reports_sizes else [value]

    return dataclasses.replace(step_run, processes=Processes(gather=gather))


def test_the_engine_is_sized_for_the_largest_shard_of_all_hosts(model_path, step_run, tmp_path):
    larger = {"num_requests": 9, "longest_prompt": 70, "longest_total": 120, "total_tokens": 400}
    derived = dataclasses.replace(ENGINE, max_seqs=None, max_seq_len=None)
    infer(config_for(model_path, engine=derived), at(tmp_path, beside_a_host(step_run, larger, 2**40)))
    engine = read_json(f"{tmp_path}/summary.json")["engine"]
    assert (engine["max_seqs"], engine["max_seq_len"]) == (9, 120)


def test_the_engine_is_sized_for_the_least_memory_of_all_hosts(model_path, step_run, tmp_path):
    with pytest.raises(CapacityError, match=r"the engine needs .* it may use 0\.00 GiB"):
        infer(config_for(model_path, engine=EngineConfig()), at(tmp_path, beside_a_host(step_run, None, 1000)))


def test_rows_of_texts_conversations_and_token_ids_are_served(model_path, step_run, tmp_path):
    # The byte tokenizer's ids are bytes; 259 starts a turn and 260 ends it.
    system, user = [259, *b"system\nBe brief.", 260, *b"\n"], [259, *b"user\none?", 260, *b"\n", 259, *b"assistant\n"]
    turn = {"role": "user", "content": "one?"}
    prompts = [
        *({"prompt": "one?"}, {"messages": [turn]}, {"prompt_token_ids": user}),
        {"messages": [{"role": "system", "content": "Be brief."}, turn]},
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    config = config_for(
        model_path,
        prompts=PromptsConfig(prompts_path=str(tmp_path / "prompts.json")),
        sampling=SamplingParams(max_tokens=6, temperature=0.0),
    )
    infer(config, at(tmp_path / "out", step_run))
    rows = rows_of(tmp_path / "out")
    assert [row["prompt_token_count"] for row in rows] == [len(user)] * 3 + [len(system + user)]
    assert rows[0]["generated_tokens"] == rows[1]["generated_tokens"] == rows[2]["generated_tokens"]
    rendered = "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    with_system = "<|im_start|>system\nBe brief.<|im_end|>\n" + rendered
    assert [row["prompt"] for row in rows] == ["one?", rendered, None, with_system]
