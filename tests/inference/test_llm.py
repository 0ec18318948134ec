"""`LLM` as users call it: texts in, texts out; errors before any device work; rows that survive a kill."""

import dataclasses
import inspect
import logging
import math
import pathlib
import random
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from tokenizer_kinds import byte_fallback, write_tokenizer
from tokenizers import processors

from simpo_pipeline import LLM, SamplingParams
from simpo_pipeline.data.byte_tokenizer import write_byte_tokenizer
from simpo_pipeline.data.config import ChatConfig
from simpo_pipeline.distributed.programs import Programs, allow_strays, forbid_strays
from simpo_pipeline.errors import CapacityError, ConfigError, DataError, ModelError, PathNotFoundError
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.generated_rows import read_finished_rows
from simpo_pipeline.inference.model_folder import model_folder
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.hf_weights import save_weights

TINY = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=264,
    max_seq_len=128,
    initializer_range=0.2,
)
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
END_TOKENS = {257, 260}  # of the byte tokenizer: end of sequence, end of turn


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory, random_llama: Callable) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    write_byte_tokenizer(folder)
    save_weights(folder, random_llama(TINY, seed=1))
    return folder


@pytest.fixture(scope="module")
def llm(model_path: str) -> LLM:
    return LLM(model_path, max_seqs=2, num_pages=64)


def unchecked(function: Callable) -> Callable:
    """Return the function without the type checks of tests: it has to report users' mistakes itself."""
    return inspect.unwrap(function)


def tokens_of(outputs: list) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def test_one_text_a_list_of_texts_and_token_ids_are_the_same_prompt(llm: LLM) -> None:
    (alone,) = llm.generate("ab", GREEDY)
    (listed,) = llm.generate(["ab"], GREEDY)
    (numbers,) = llm.generate([list(b"ab")], GREEDY)
    assert (alone.prompt, alone.prompt_token_ids) == ("ab", tuple(b"ab"))
    assert listed == alone
    assert numbers == dataclasses.replace(alone, prompt=None)
    assert len(alone.outputs[0].token_ids) == 20 and alone.outputs[0].finish_reason == "length"


@pytest.mark.slow
def test_outputs_keep_the_order_of_the_prompts_and_do_not_depend_on_sizes(llm: LLM, model_path: str) -> None:
    prompts = ["x" * length for length in (40, 1, 90, 7, 7, 23, 3, 60, 5, 11)]
    sampling = SamplingParams(max_tokens=30, n=2)
    outputs = llm.generate(prompts, sampling)
    assert [output.prompt for output in outputs] == prompts
    assert all([sample.index for sample in output.outputs] == [0, 1] for output in outputs)
    other = LLM(model_path, max_seqs=3, page_size=4, num_pages=35)
    assert tokens_of(other.generate(prompts, sampling)) == tokens_of(outputs)
    # Equal prompts at two positions, and samples of one prompt, are drawn with different keys.
    assert len({sample.token_ids for output in outputs[3:5] for sample in output.outputs}) == 4


def test_default_sampling_params_give_sixteen_tokens_as_in_vllm(llm: LLM) -> None:
    (output,) = llm.generate("ab")
    (sample,) = output.outputs
    assert len(sample.token_ids) == 16 or sample.token_ids[-1] in END_TOKENS


def test_each_prompt_may_have_its_own_sampling_params(llm: LLM) -> None:
    own = [dataclasses.replace(GREEDY, max_tokens=count) for count in (3, 9)]
    outputs = llm.generate(["ab", "ab"], own)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 9]


def test_a_chat_is_answered_under_the_chat_template(llm: LLM) -> None:
    turns = [{"role": "user", "content": "hi"}]
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    (answer,) = llm.chat(turns, GREEDY)
    assert answer.prompt == rendered
    assert answer.outputs == llm.generate(rendered, GREEDY)[0].outputs
    longer = [*turns, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
    assert llm.chat([turns, longer], GREEDY)[0] == answer


def test_the_tokenizers_end_tokens_stop_a_sample_unless_they_are_ignored(llm: LLM) -> None:
    drawn = SamplingParams(max_tokens=60, n=40, temperature=2.0)
    for ignore_eos, reasons in ((True, {"length"}), (False, {"length", "stop"})):
        (output,) = llm.generate("ab", dataclasses.replace(drawn, ignore_eos=ignore_eos))
        assert {sample.finish_reason for sample in output.outputs} == reasons
    finished = [sample for sample in output.outputs if sample.finish_reason == "stop"]
    assert {sample.token_ids[-1] for sample in finished} <= END_TOKENS
    own = dataclasses.replace(drawn, stop_token_ids=(65,))
    (output,) = llm.generate("ab", own)
    assert 65 in {sample.token_ids[-1] for sample in output.outputs if sample.finish_reason == "stop"}


def test_a_stop_string_stops_a_sample_and_is_excluded_from_its_text(llm: LLM) -> None:
    whole = llm.generate("ab", GREEDY)[0].outputs[0]
    stop = next(text for at in range(3, 17) if "\ufffd" not in (text := whole.text[at : at + 2]) and len(text) == 2)
    (sample,) = llm.generate("ab", dataclasses.replace(GREEDY, stop=("no such text", stop)))[0].outputs
    assert sample.finish_reason == "stop_string"
    assert sample.text == whole.text[: whole.text.index(stop)]
    assert sample.token_ids == whole.token_ids[: len(sample.token_ids)] and len(sample.token_ids) < 20
    patient = dataclasses.replace(GREEDY, stop=(stop,), min_tokens=len(sample.token_ids) + 1)
    assert len(llm.generate("ab", patient)[0].outputs[0].token_ids) > len(sample.token_ids)


def test_log_probabilities_are_those_of_the_drawn_tokens_and_of_the_likeliest(llm: LLM) -> None:
    (sample,) = llm.generate("ab", dataclasses.replace(GREEDY, logprobs=3))[0].outputs
    assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids) == 20
    chosen = [each[token] for token, each in zip(sample.token_ids, sample.logprobs, strict=True)]
    assert all(len(each) == 3 and max(each.values()) == own for each, own in zip(sample.logprobs, chosen, strict=True))
    assert sample.cumulative_logprob == sum(chosen) < 0
    assert llm.generate("ab", GREEDY)[0].outputs[0].logprobs is None


def test_all_programs_are_compiled_at_construction(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_now(*args: Any, **options: Any) -> None:
        raise AssertionError("compiled while serving")

    monkeypatch.setattr(Programs, "compile", compile_now)
    forbid_strays()  # and nothing else may run, so jit cannot compile either
    try:
        prompts = ["x" * length for length in range(1, 100, 7)]
        llm.generate(prompts, SamplingParams(max_tokens=9, top_k=3, repetition_penalty=1.5, stop=("b",), logprobs=2))
    finally:
        allow_strays()


def test_a_single_stop_string_and_top_k_of_minus_one_mean_what_they_mean_in_vllm(llm: LLM) -> None:
    drawn = SamplingParams(max_tokens=20, temperature=2.0, seed=7, ignore_eos=True)
    (every,) = llm.generate("ab", drawn)
    assert llm.generate("ab", dataclasses.replace(drawn, top_k=-1)) == [every]
    text = every.outputs[0].text
    stop = next(letter for letter in text[3:] if letter != "\ufffd")
    (sample,) = llm.generate("ab", dataclasses.replace(drawn, stop=stop))[0].outputs
    assert (sample.finish_reason, sample.text) == ("stop_string", text[: text.index(stop)])


def test_a_seed_of_none_is_drawn_logged_and_recorded_so_that_the_call_can_be_repeated(
    llm: LLM, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, fresh = ["ab", "xy"], SamplingParams(max_tokens=12, seed=None, ignore_eos=True)
    path = str(tmp_path / "rows.jsonl")
    with caplog.at_level(logging.INFO, logger="simpo_pipeline.inference.llm"):
        outputs = llm.generate(prompts, fresh, output_path=path)
    (seed,) = {output.seed for output in outputs}
    assert f"seed {seed}" in caplog.text
    assert {row["seed"] for row in read_finished_rows(path)} == {seed}
    assert llm.generate(prompts, dataclasses.replace(fresh, seed=seed)) == outputs
    again = llm.generate(prompts, fresh)
    assert again[0].seed != seed and tokens_of(again) != tokens_of(outputs)
    given = llm.generate(prompts, [fresh, GREEDY], output_path=path)
    assert given[1].seed == GREEDY.seed
    assert ["seed" in row for row in sorted(read_finished_rows(path), key=lambda row: row["prompt"])] == [True, False]


def test_biases_and_bad_words_change_only_the_tokens_they_name(llm: LLM) -> None:
    (plain,) = llm.generate("ab", GREEDY)[0].outputs
    (forced,) = llm.generate("ab", dataclasses.replace(GREEDY, logit_bias={ord("q"): 100}))[0].outputs
    assert forced.text == "q" * 20
    first = plain.token_ids[0]
    (banned,) = llm.generate("ab", dataclasses.replace(GREEDY, logit_bias={first: -math.inf}))[0].outputs
    assert first not in banned.token_ids and len(banned.token_ids) == 20
    word = dataclasses.replace(GREEDY, logit_bias={ord("q"): 100, ord("r"): 50}, bad_words=["q"])
    assert llm.generate("ab", word)[0].outputs[0].text == "r" * 20
    # A bias below any logit and a penalty that it outweighs leave every token as it was.
    (same,) = llm.generate("ab", dataclasses.replace(GREEDY, logit_bias={261: -100}))[0].outputs
    assert same == plain or 261 in plain.token_ids


def test_log_probabilities_are_the_models_even_with_biases_and_penalties(llm: LLM) -> None:
    forced = dataclasses.replace(GREEDY, logit_bias={ord("q"): 100}, frequency_penalty=0.5, logprobs=0)
    (sample,) = llm.generate("ab", forced)[0].outputs
    (next_one,) = llm.generate("ab" + "q" * 5, dataclasses.replace(forced, max_tokens=1))[0].outputs
    assert sample.logprobs is not None and next_one.logprobs is not None
    assert sample.logprobs[5][ord("q")] == pytest.approx(next_one.logprobs[0][ord("q")], abs=1e-5) and (
        sample.logprobs[5][ord("q")] < -0.01
    )


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return a folder with a tokenizer like Llama 2's: BOS and a blank before each text, no chat template."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = byte_fallback()
    first = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    write_tokenizer(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return folder


@pytest.fixture(scope="module")
def base_llm(llama_tokenizer: pathlib.Path, random_llama: Callable) -> LLM:
    """Return a model without a chat template."""
    vocab_size = tokenizers.Tokenizer.from_file(str(llama_tokenizer / "tokenizer.json")).get_vocab_size()
    save_weights(str(llama_tokenizer), random_llama(dataclasses.replace(TINY, vocab_size=vocab_size), seed=1))
    return LLM(model=str(llama_tokenizer), max_seqs=2, num_pages=64)


def test_a_model_without_a_chat_template_continues_texts_and_refuses_chats(
    base_llm: LLM, llama_tokenizer: pathlib.Path
) -> None:
    oracle = tokenizers.Tokenizer.from_file(str(llama_tokenizer / "tokenizer.json"))
    text = "The capital of France is"
    (output,) = base_llm.generate(text, GREEDY)
    assert list(output.prompt_token_ids) == oracle.encode(text).ids
    with pytest.raises(DataError, match="has no chat template"):
        base_llm.chat([{"role": "user", "content": "hi"}])


def test_prompt_and_text_are_what_the_whole_sequence_decodes_to(base_llm: LLM, llama_tokenizer: pathlib.Path) -> None:
    oracle = tokenizers.Tokenizer.from_file(str(llama_tokenizer / "tokenizer.json"))
    text = "The capital of France is"
    paris = oracle.token_to_id("▁Paris")
    forced = dataclasses.replace(GREEDY, logit_bias={paris: 100}, max_tokens=2)
    (sample,) = base_llm.generate(text, forced)[0].outputs
    assert sample.text == " Paris Paris"
    (stopped,) = base_llm.generate(text, dataclasses.replace(forced, stop=" Paris"))[0].outputs
    assert (stopped.text, stopped.finish_reason, stopped.token_ids) == ("", "stop_string", (paris,))
    for output in base_llm.generate([text] * 30, SamplingParams(max_tokens=20, temperature=1.5, ignore_eos=True)):
        whole = oracle.decode([*output.prompt_token_ids, *output.outputs[0].token_ids], skip_special_tokens=True)
        assert text + output.outputs[0].text == whole


def test_a_text_that_begins_with_the_bos_text_is_encoded_as_it_is_with_a_warning(
    base_llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    (doubled,) = base_llm.generate(["<s>The end"], GREEDY)
    assert doubled.prompt_token_ids[:2] == (1, 1)
    assert "1 of 1 prompts, the first of them prompts[0], begin with '<s>'" in caplog.text
    caplog.clear()
    base_llm.generate(["The end", [1, 1, 5], "the <s>"], GREEDY)
    assert "begin with" not in caplog.text


def test_a_bad_word_of_several_tokens_is_refused(base_llm: LLM) -> None:
    with pytest.raises(ConfigError, match=r"bad_words has 'Tokyo', which is \d tokens .*only words of one token are"):
        base_llm.generate("a", SamplingParams(bad_words=("Paris", "Tokyo")))


def test_prompts_that_are_not_read_as_they_were_written_are_counted_in_the_log(
    llm: LLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "_chat_config", ChatConfig(special_text="plain"))
    plain, special = ([{"role": "user", "content": content}] for content in ("hi", "a<|im_end|>b"))
    llm.chat([plain, plain], GREEDY)
    assert not caplog.records
    (_, output) = llm.chat([plain, special], dataclasses.replace(GREEDY, n=2))
    assert bytes(token for token in output.prompt_token_ids if token < 256).count(b"<|im_end|>") == 1
    assert [record.getMessage() for record in caplog.records] == ["1 of 2 prompts have special text"]


def test_a_model_of_the_hub_is_the_folder_in_the_hubs_cache(
    model_path: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(model_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("org/tiny", f"org/tiny@{commit}"):
        assert pathlib.Path(model_folder(name)).resolve() == pathlib.Path(model_path)
    with pytest.raises(ModelError, match="'org/other' is not an existing folder, and could not be loaded from the hub"):
        LLM(model="org/other")


def test_a_path_is_never_looked_up_on_the_hub(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.chdir(pathlib.Path(model_path).parent)
    for path in (model_path, pathlib.Path(model_path).name, "/no/such/folder", "./none", "gs://bucket/model"):
        assert model_folder(path) == path


LONG = [1] * 120


@pytest.mark.parametrize(
    ("prompts", "sampling", "error", "message"),
    [
        (["ab", ""], None, CapacityError, "request 1 .*empty prompt; give it at least one token"),
        ([[]], None, CapacityError, "request 0 .*empty prompt"),
        ([[1, 264]], None, CapacityError, "has token id 264; the model's token ids are 0 to 263"),
        ([[1, -1]], None, CapacityError, "has token id -1; the model's token ids are 0 to 263"),
        ([LONG], None, CapacityError, r"120 prompt tokens and max_tokens 16, 136 in total; engine\.max_seq_len is 128"),
        (["ab"], [GREEDY] * 2, ConfigError, "2 sampling_params for 1 prompts; pass one, or one per prompt"),
        (
            ["ab"],
            SamplingParams(stop_token_ids=(264,)),
            ConfigError,
            "stop_token_ids has 264; the model's token ids are 0 to",
        ),
        (
            ["ab"],
            SamplingParams(stop_token_ids=tuple(range(7))),
            ConfigError,
            "and the tokenizer's end tokens .* are 9 stop tokens; at most 8 are supported. "
            "Pass fewer, or set ignore_eos",
        ),
        ([1, 2], None, ConfigError, r"prompts is a list with integers; pass \[\[...\]\] for one prompt"),
        ([["a"]], None, ConfigError, r"prompts\[0\] is \['a'\]; a prompt must be a text or a list of token ids"),
        ([b"ab"], None, ConfigError, r"prompts\[0\] is b'ab'; a prompt must be"),
        ([[True, False]], None, ConfigError, r"prompts\[0\] is \[True, False\]; a prompt must be"),
        (
            ["ab"],
            SamplingParams(logit_bias=dict.fromkeys(range(264), -math.inf)),
            ConfigError,
            "ban all 264 tokens of the vocabulary; leave at least one",
        ),
        (
            ["ab"],
            SamplingParams(logit_bias=dict.fromkeys({*range(264)} - END_TOKENS, -math.inf), min_tokens=1),
            ConfigError,
            "logit_bias, bad_words and min_tokens ban all 264 tokens",
        ),
        (
            ["ab"],
            SamplingParams(logit_bias={264: 1.0}),
            ConfigError,
            "logit_bias has 264; the model's token ids are 0 to",
        ),
        (["ab"], SamplingParams(bad_words=("bad",)), ConfigError, "bad_words has 'bad', which is 3 tokens of this"),
        (["ab"], {"max_tokens": 3}, ConfigError, "sampling_params is .*; pass SamplingParams, or a list with one per"),
        (None, None, ConfigError, "prompts is a NoneType; pass a text, or a list"),
    ],
)
def test_invalid_requests_are_refused_before_any_device_work(
    llm: LLM, tmp_path: pathlib.Path, prompts: Any, sampling: Any, error: type[Exception], message: str
) -> None:
    earlier = tmp_path / "rows.jsonl"
    earlier.write_text("rows of an earlier run\n")
    forbid_strays()
    try:
        with pytest.raises(error, match=message), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "generate", None)
            unchecked(LLM.generate)(llm, prompts, sampling, output_path=str(earlier))
    finally:
        allow_strays()
    assert earlier.read_text() == "rows of an earlier run\n"


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == llm.chat([]) == []


@pytest.mark.parametrize(
    "messages",
    [
        *([[]], [[{"role": "user"}]], ["hi"], [[{"role": "user", "content": "a"}, "b"]], [{"content": "a"}]),
        [[{"role": "user", "content": "a", "tool_calls": [1]}]],
        [[{"role": "user", "content": [{"type": "image"}]}]],
    ],
)
def test_an_invalid_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(ConfigError, match=r"messages\[0\] is .*a conversation must be a list of turns with role and"):
        unchecked(LLM.chat)(llm, messages)


def test_messages_that_are_no_list_are_refused(llm: LLM) -> None:
    for messages in ({"role": "user", "content": "hi"}, None, 5):
        with pytest.raises(ConfigError, match=r"messages is .*; pass a conversation \(a list of turns\), or a list"):
            unchecked(LLM.chat)(llm, messages)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, ConfigError, "dtype is 'int8'; expected one of float32, bfloat16"),
        ({"max_seqs": 0}, ConfigError, "max_seqs must be at least 1, got 0"),
        ({"max_seq_len": 129}, ConfigError, "max_seq_len is 129, but the model has only 128 positions; lower it"),
        ({"memory_utilization": 1.5}, ConfigError, r"memory_utilization must lie in \(0, 1\], got 1.5"),
        ({"model": 5}, ConfigError, "model is 5; pass a folder, or the id of a model on the hub"),
        (
            {"num_pages": 10**9},
            CapacityError,
            r"the engine needs .* GiB .*requested by engine\.num_pages\); it may use",
        ),
    ],
)
def test_an_impossible_engine_is_refused(model_path: str, options: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        unchecked(LLM.__init__)(object.__new__(LLM), **{"model": pathlib.Path(model_path), **options})


def test_a_folder_without_a_model_is_refused(tmp_path: pathlib.Path, model_path: str) -> None:
    with pytest.raises(PathNotFoundError, match=r"config\.json"):
        LLM(str(tmp_path))
    (tmp_path / "config.json").write_bytes(pathlib.Path(model_path, "config.json").read_bytes())
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        LLM(model=str(tmp_path))


def test_the_row_file_contains_the_returned_samples_and_none_of_earlier_calls(llm: LLM, tmp_path) -> None:
    path = str(tmp_path / "rows.jsonl")
    for prompts in (["earlier"] * 9, ["ab", "xy"]):
        outputs = llm.generate(prompts, SamplingParams(max_tokens=12, n=2, logprobs=1), output_path=path)
    rows = sorted(read_finished_rows(path), key=lambda row: (row["global_prompt_index"], row["sample_index"]))
    samples = [(output, sample) for output in outputs for sample in output.outputs]
    assert len(rows) == len(samples) == 4
    for row, (output, sample) in zip(rows, samples, strict=True):
        assert (row["prompt"], row["sample_index"]) == (output.prompt, sample.index)
        assert (row["generated_text"], tuple(row["generated_tokens"])) == (sample.text, sample.token_ids)
        assert (row["finish_reason"], row["cumulative_logprob"]) == (sample.finish_reason, sample.cumulative_logprob)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_kill_loses_no_finished_sample(
    llm: LLM, model_path: str, tmp_path: pathlib.Path, python: list[str], seed: int
) -> None:
    path, count = str(tmp_path / "rows.jsonl"), 400
    program = str(pathlib.Path(__file__).with_name("llm_to_be_killed.py"))
    process = subprocess.Popen([*python, program, model_path, path, str(count)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    finished: set[int] = set()
    goal = random.Random(seed).randrange(20, 300)
    with process.stdout as output:
        for line in output:
            finished |= set(map(int, line.split()))
            if len(finished) >= goal and process.poll() is None:
                process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    rows = {row["global_prompt_index"]: row["generated_tokens"] for row in read_finished_rows(path)}
    assert finished <= rows.keys() and goal <= len(rows) < count
    outputs = llm.generate([f"prompt {index}" for index in range(count)], SamplingParams(max_tokens=24))
    assert all(tuple(tokens) == outputs[index].outputs[0].token_ids for index, tokens in rows.items())
