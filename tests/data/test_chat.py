"""Conversations to tokens: where the answer starts and ends, and which templates are supported."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from simpo_pipeline.data.byte_tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, write_byte_tokenizer
from simpo_pipeline.data.chat import encode_chat, encode_turn, load_tokenizer, pad_token_id, stop_token_ids
from simpo_pipeline.data.records import Message
from simpo_pipeline.errors import DataError

QUESTION_AND_ANSWER = (Message("user", "Hi"), Message("assistant", "Hello."))

# Templates like those of Llama 3 (an end token, nothing after it) and of Llama 2 (no header for the answer).
LLAMA3_STYLE = (
    "{{ '<|bos|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
LLAMA2_STYLE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[Q] ' + m['content'] + ' [/Q]' }}"
    "{% else %}{{ ' ' + m['content'] + ' <|eos|>' }}{% endif %}{% endfor %}"
)
NO_END_TOKEN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_the_answer_ends_with_its_end_of_turn_token_and_not_with_the_templates_line_break(tokenizer: Any):
    turn = encode_turn(tokenizer, QUESTION_AND_ANSWER)
    assert tokenizer.decode(turn.prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(turn.answer) == "Hello.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "answer"),
    [(LLAMA3_STYLE, "Hello.<|im_end|>"), (LLAMA2_STYLE, " Hello. <|eos|>"), (NO_END_TOKEN, "Hello.\n")],
)
def test_other_templates_split_where_generation_would_start(tokenizer: Any, template: str, answer: str):
    tokenizer.chat_template = template
    turn = encode_turn(tokenizer, QUESTION_AND_ANSWER)
    assert turn.prompt == encode_chat(tokenizer, QUESTION_AND_ANSWER[:1], add_generation_prompt=True)
    assert tokenizer.decode(turn.answer) == answer


def test_answers_of_earlier_turns_belong_to_the_prompt(tokenizer: Any):
    conversation = (*QUESTION_AND_ANSWER, Message("user", "Bye"), Message("assistant", "See you."))
    turn = encode_turn(tokenizer, conversation)
    assert "Hello.<|im_end|>" in tokenizer.decode(turn.prompt)
    assert tokenizer.decode(turn.answer) == "See you.<|im_end|>"


def merging_tokenizer(folder: Path) -> Any:
    """Return the byte tokenizer with one more token: two line breaks in a row."""
    write_byte_tokenizer(str(folder))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["ĊĊ"] = VOCAB_SIZE
    content["model"]["merges"] = [["Ċ", "Ċ"]]
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(str(folder))


def test_an_answer_that_would_merge_with_the_prompts_end_starts_from_the_prompts_own_tokens(tmp_path: Path):
    tokenizer = merging_tokenizer(tmp_path)
    prompt = QUESTION_AND_ANSWER[:1]
    whole = encode_chat(tokenizer, (*prompt, Message("assistant", "\nHello.")), add_generation_prompt=False)
    assert VOCAB_SIZE in whole, "the line breaks of the prompt and the answer should merge"
    turn = encode_turn(tokenizer, (*prompt, Message("assistant", "\nHello.")))
    assert turn.prompt == encode_chat(tokenizer, prompt, add_generation_prompt=True)
    assert tokenizer.decode(turn.answer) == "\nHello.<|im_end|>"


def test_a_template_that_renders_the_prompt_differently_with_an_answer_is_refused_showing_where(tokenizer: Any):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}GO{% endif %}"
    )
    with pytest.raises(DataError, match=r"renders the prompt differently .* 'GO' becomes 'Hello\.\|' at character 3"):
        encode_turn(tokenizer, QUESTION_AND_ANSWER)


def test_a_template_that_drops_the_prompts_end_is_refused(tokenizer: Any):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}Hello. and more{% endif %}"
    )
    with pytest.raises(DataError, match="' and more' becomes '' at character 8"):
        encode_turn(tokenizer, QUESTION_AND_ANSWER)


def test_roles_the_template_refuses_are_named(tokenizer: Any):
    tokenizer.chat_template = "{{ raise_exception('no system turn, please') }}"
    with pytest.raises(DataError, match="rejects a conversation of system: no system turn, please"):
        encode_chat(tokenizer, [Message("system", "x")], add_generation_prompt=False)


def test_generation_stops_at_the_end_of_turn_and_end_of_text_tokens(tokenizer: Any):
    assert tokenizer.convert_ids_to_tokens(list(stop_token_ids(tokenizer))) == ["<|eos|>", "<|im_end|>"]


def test_without_an_end_of_turn_token_generation_stops_at_end_of_text_only(tokenizer: Any):
    tokenizer.chat_template = NO_END_TOKEN
    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_padding_falls_back_to_the_end_token_and_then_to_zero(tokenizer: Any):
    assert tokenizer.decode([pad_token_id(tokenizer)]) == "<|pad|>"
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_the_byte_tokenizer_maps_each_byte_to_its_value_and_back(tokenizer: Any):
    text = "".join(map(chr, range(0x400))) + "語😀"
    assert tokenizer.encode(text) == list(text.encode("utf-8"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_byte_tokenizer_has_its_special_tokens_above_the_bytes(tokenizer: Any):
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(256, VOCAB_SIZE))
    assert tokenizer.decode([72, 105, 260, 258], skip_special_tokens=True) == "Hi"


def test_a_tokenizer_loads_from_a_remote_folder_without_fetching_the_weights(byte_tokenizer_dir: Path):
    remote = fsspec.filesystem("memory")
    for file in byte_tokenizer_dir.iterdir():
        remote.pipe_file(f"/model/{file.name}", file.read_bytes())
    remote.pipe_file("/model/model.safetensors", b"gigabytes")
    remote.pipe_file("/model/original/tokenizer.json", b"another one")
    tokenizer = load_tokenizer("memory://model")
    assert tokenizer.encode("Hi") == [72, 105]


def test_a_tokenizer_without_chat_template_is_refused(byte_tokenizer_dir: Path, tmp_path: Path):
    config = json.loads((byte_tokenizer_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((byte_tokenizer_dir / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="has no chat template"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no tokenizer could be loaded .*expected a folder with tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_an_absent_folder_is_not_looked_up_on_the_hub(tmp_path: Path):
    with pytest.raises(DataError, match="there is no such folder"):
        load_tokenizer(str(tmp_path / "absent"))


def test_loading_a_tokenizer_prints_nothing_and_leaves_logging_as_it_was(byte_tokenizer_dir: Path):
    code = (
        "import logging, sys; from simpo_pipeline.data.chat import load_tokenizer; load_tokenizer(sys.argv[1]); "
        "assert not logging.getLogger('transformers').filters; assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(byte_tokenizer_dir)], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert not logging.getLogger("transformers").filters
