"""Conversations to tokens: where the answer starts and ends, and which templates are supported."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tokenizer_kinds import KINDS, write_tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Oracle

from simpo_pipeline.data import template_sandbox
from simpo_pipeline.data.byte_tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, write_byte_tokenizer
from simpo_pipeline.data.chat import encode_chat, encode_text, encode_turn, load_tokenizer, pad_token_id, stop_token_ids
from simpo_pipeline.data.config import ChatConfig
from simpo_pipeline.data.messages import Message
from simpo_pipeline.errors import ConfigError, DataError

MERGED = 256  # the id of two line breaks in a row, in the tokenizer that merges them
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
COUNTED = ChatConfig(omitted_text="count", unencodable_text="count", merged_border="count")


def test_the_answer_ends_with_its_end_of_turn_token_and_not_with_the_templates_line_break(tokenizer: Any):
    turn = encode_turn(tokenizer, QUESTION_AND_ANSWER)
    assert tokenizer.decode(turn.prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(turn.answer) == "Hello.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "answer"),
    [(LLAMA3_STYLE, "Hello.<|im_end|>"), (LLAMA2_STYLE, " Hello. <|eos|>"), (NO_END_TOKEN, "Hello.\n")],
)
def test_other_templates_split_where_generation_would_start(tokenizer: Any, template: str, answer: str):
    tokenizer = replace(tokenizer, chat_template=template)
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
    content["model"]["vocab"]["ĊĊ"] = MERGED
    content["model"]["merges"] = [["Ċ", "Ċ"]]
    for token in content["added_tokens"]:
        token["id"] += 1
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(str(folder))


def test_an_answer_that_would_merge_with_the_prompts_end_starts_from_the_prompts_own_tokens(tmp_path: Path):
    tokenizer = merging_tokenizer(tmp_path)
    prompt = QUESTION_AND_ANSWER[:1]
    whole = encode_chat(tokenizer, (*prompt, Message("assistant", "\nHello.")), add_generation_prompt=False)
    assert MERGED in whole, "the line breaks of the prompt and the answer should merge"
    with pytest.raises(DataError, match=r"beginning of the answer '\\nHello\..* set merged_border to 'count'"):
        encode_turn(tokenizer, (*prompt, Message("assistant", "\nHello.")))
    turn = encode_turn(tokenizer, (*prompt, Message("assistant", "\nHello.")), COUNTED)
    assert turn.prompt == encode_chat(tokenizer, prompt, add_generation_prompt=True)
    assert tokenizer.decode(turn.answer) == "\nHello.<|im_end|>"
    assert turn.notes == {"merged_border"}


def test_a_template_that_renders_the_prompt_differently_with_an_answer_is_refused_showing_where(tokenizer: Any):
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}GO{% endif %}"
    tokenizer = replace(tokenizer, chat_template=template)
    with pytest.raises(DataError, match=r"renders the prompt differently .* 'GO' becomes 'Hello\.\|' at character 3"):
        encode_turn(tokenizer, QUESTION_AND_ANSWER)


def test_a_template_that_drops_the_prompts_end_is_refused(tokenizer: Any):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = replace(tokenizer, chat_template=template + "{% if add_generation_prompt %}Hello. and more{% endif %}")
    with pytest.raises(DataError, match="' and more' becomes '' at character 8"):
        encode_turn(tokenizer, QUESTION_AND_ANSWER)


def test_roles_the_template_refuses_are_named(tokenizer: Any):
    tokenizer = replace(tokenizer, chat_template="{{ raise_exception('no system turn, please') }}")
    with pytest.raises(DataError, match="rejects a conversation of system: no system turn, please"):
        encode_chat(tokenizer, [Message("system", "x")], add_generation_prompt=False)


def test_generation_stops_at_the_end_of_turn_and_end_of_text_tokens(tokenizer: Any):
    assert [tokenizer.decode([token]) for token in stop_token_ids(tokenizer)] == ["<|eos|>", "<|im_end|>"]


def test_without_an_end_of_turn_token_generation_stops_at_end_of_text_only(tokenizer: Any):
    tokenizer = replace(tokenizer, chat_template=NO_END_TOKEN)
    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_padding_falls_back_to_the_end_token_and_then_to_zero(tokenizer: Any):
    assert tokenizer.decode([pad_token_id(tokenizer)]) == "<|pad|>"
    without_pad = replace(tokenizer, special_tokens={"eos_token": "<|eos|>"})
    assert pad_token_id(without_pad) == tokenizer.eos_token_id
    assert pad_token_id(replace(tokenizer, special_tokens={})) == 0


def test_the_byte_tokenizer_maps_each_byte_to_its_value_and_back(tokenizer: Any):
    text = "".join(map(chr, range(0x400))) + "語😀"
    assert tokenizer.encode(text) == list(text.encode("utf-8"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_byte_tokenizer_has_its_special_tokens_above_the_bytes(tokenizer: Any):
    assert tokenizer.backend.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.backend.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(256, VOCAB_SIZE))
    assert tokenizer.decode([72, 105, 260, 258], skip_special_tokens=True) == "Hi"


def test_a_tokenizer_loads_from_a_remote_folder_without_fetching_the_weights(byte_tokenizer_dir: Path):
    remote = fsspec.filesystem("memory")
    for file in byte_tokenizer_dir.iterdir():
        remote.pipe_file(f"/model/{file.name}", file.read_bytes())
    remote.pipe_file("/model/model.safetensors", b"gigabytes")
    remote.pipe_file("/model/original/tokenizer.json", b"another one")
    tokenizer = load_tokenizer("memory://model")
    assert tokenizer.encode("Hi") == [72, 105]


def test_messages_cannot_be_encoded_without_a_chat_template_but_text_can(tokenizer: Any):
    tokenizer = replace(tokenizer, chat_template=None)
    with pytest.raises(DataError, match="has no chat template"):
        encode_chat(tokenizer, QUESTION_AND_ANSWER, add_generation_prompt=True)
    assert encode_text(tokenizer, "Hi") == [72, 105]
    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no tokenizer could be loaded, .*expected a folder with tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_an_absent_folder_is_not_looked_up_on_the_hub(tmp_path: Path):
    with pytest.raises(DataError, match="there is no such folder"):
        load_tokenizer(str(tmp_path / "absent"))


def test_loading_a_tokenizer_prints_nothing_and_imports_neither_jax_nor_transformers(byte_tokenizer_dir: Path):
    code = (
        "import sys; from simpo_pipeline.data.chat import load_tokenizer; load_tokenizer(sys.argv[1]); "
        "assert not {'jax', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(byte_tokenizer_dir)], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


DATED = "{{ strftime_now('%d %b %Y') }}" + LLAMA3_STYLE
# The prompt ends in a blank, which a tokenizer with pieces like "▁Paris" merges with the answer.
ENDS_IN_A_BLANK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST] ' }}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
NO_THOUGHTS = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ m['role'] + ': ' + c + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_an_answer_after_a_blank_gets_no_second_blank_from_the_tokenizer(tmp_path: Path):
    write_tokenizer(KINDS["byte_fallback"](), tmp_path, eos_token="</s>", chat_template=ENDS_IN_A_BLANK)
    oracle = Oracle.from_file(str(tmp_path / "tokenizer.json"))
    chat = (Message("user", "Where?"), Message("assistant", "Paris is."))
    with pytest.raises(DataError, match=r"merges the end of the prompt with the beginning of the answer 'Paris is"):
        encode_turn(load_tokenizer(str(tmp_path)), chat)
    turn = encode_turn(load_tokenizer(str(tmp_path)), chat, COUNTED)
    prompt, whole = "[INST] Where? [/INST] ", "[INST] Where? [/INST] Paris is.</s>"
    assert turn.prompt == oracle.encode(prompt, add_special_tokens=False).ids
    assert oracle.decode(turn.prompt + turn.answer, skip_special_tokens=False) == whole
    assert oracle.id_to_token(turn.prompt[-1]) == "▁" and oracle.id_to_token(turn.answer[0]) == "Paris"
    assert turn.notes == {"merged_border"}
    # Encoded alone, the answer would begin with a blank of its own.
    assert [oracle.id_to_token(token) for token in oracle.encode("Paris").ids] == ["▁Paris"]


def test_a_template_that_prints_the_date_needs_one(tokenizer: Any):
    tokenizer = replace(tokenizer, chat_template=DATED)
    with pytest.raises(DataError, match=r"prints today's date \('%d %b %Y'\), .* set the date of the chat config"):
        encode_turn(tokenizer, QUESTION_AND_ANSWER)
    for date in ("2024-07-26", "2024-07-26T23:59:59"):
        turn = encode_turn(tokenizer, QUESTION_AND_ANSWER, ChatConfig(date))
        assert tokenizer.decode(turn.prompt).startswith("26 Jul 2024<|bos|>")
    assert stop_token_ids(tokenizer) == (257, 260)


@pytest.mark.parametrize(
    ("name", "value"), [("date", "yesterday"), ("date", "26 Jul 2024"), ("special_text", "drop"), ("omitted_text", "")]
)
def test_a_wrong_chat_config_is_refused(name: str, value: str):
    config = ChatConfig()
    object.__setattr__(config, name, value)  # the checker of annotations would refuse it first
    with pytest.raises(ConfigError, match=f"{name} is {value!r}; expected"):
        config.__post_init__()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages + 1 }}", "rejects a conversation of user: TypeError: "),
        ("{{ messages[0].a.b }}", "rejects a conversation of user: UndefinedError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ range }}", "prints a function or an object of Python"),
        ("{{ 'The keys: ' ~ messages[0].keys }}", "prints a function or an object of Python"),
        ("{% for m in messages %}", "cannot be compiled at line 1: .*correct the template"),
        ("{{ ['a', 'b'] | random }}", "cannot be compiled at line 1: No filter named 'random'"),
        ("{{ lipsum() }}", "UndefinedError: 'lipsum' is undefined"),
    ],
)
def test_every_error_of_a_template_names_the_tokenizer_and_is_ours(tokenizer: Any, template: str, message: str):
    with pytest.raises(DataError, match=rf"the chat template of .*byte_tokenizer.*({message})") as refusal:
        encode_turn(replace(tokenizer, chat_template=template), QUESTION_AND_ANSWER)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}", "more than 1,000 steps"),
        ("{% set s = 'a' * 99 %}{% for i in s %}{% for j in s %}{% endfor %}{% endfor %}", "more than 1,000 steps"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(64) }}",
            "more than 1,000 steps",
        ),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "more than 20,000 characters"),
        ("{{ 'a' * 10 ** 10 }}", "more than 20,000 characters"),
        ("{{ [1] * 10 ** 10 }}", "more than 20,000 characters"),
        ("{{ 10 ** 10 ** 10 }}", "computes a power"),
        ("{% for i in range(999) %}{% set x = 'a' * 9999 %}{% endfor %}", "more than 20,000 characters"),
        ("{% for i in range(99) %}{% set x = range(99) | list %}{% endfor %}", "more than 1,000 steps"),
        ("{% set n = [1] * 99 %}{% for i in n %}{% set x = n | map('string') | join %}{% endfor %}", "1,000 steps"),
        ("{% set n = namespace(l=1) %}{% for i in range(64) %}{% set n.l = [n.l, n.l] %}{% endfor %}", "1,000 steps"),
        ("{% set n = namespace(l=1) %}{% for i in range(64) %}{% set n.l = {1: n.l, 2: n.l} %}{% endfor %}", "1,000"),
        ("{{ 'a' | center(10 ** 10) }}", "more than 20,000 characters"),
        ("{{ 'a'.rjust(10 ** 10) }}", "more than 20,000 characters"),
        ("{{ '%30000d' % 1 }}", "more than 20,000 characters"),
        ("{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "20,000 char"),
        ("{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}", "1,000 steps"),
        ("{% for i in range(999) %}{{ 'some words ' * 9 }}{% endfor %}", "more than 20,000 characters"),
    ],
)
def test_a_template_that_might_never_end_or_makes_too_much_text_is_stopped(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, message: str
):
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 1_000)
    monkeypatch.setattr(template_sandbox, "MAX_CHARACTERS", 20_000)
    with pytest.raises(DataError, match=rf"the chat template of .*byte_tokenizer.*{message}"):
        encode_turn(replace(tokenizer, chat_template=template), QUESTION_AND_ANSWER)


def test_a_template_that_opens_another_turn_after_the_answer_is_refused(tokenizer: Any):
    ignoring = tokenizer.chat_template.replace("{% if add_generation_prompt %}", "").rpartition("{% endif %}")[0]
    with pytest.raises(DataError, match=r"writes '\\n<\|im_start\|>assistant\\n' after the end of an answer"):
        encode_turn(replace(tokenizer, chat_template=ignoring), QUESTION_AND_ANSWER)
    # Generation does not need the answer's end, and stops there.
    assert stop_token_ids(replace(tokenizer, chat_template=ignoring)) == (257, 260)


def test_a_template_may_end_the_text_after_the_turn_and_generation_stops_at_the_turn(tokenizer: Any):
    both = tokenizer.chat_template + "{% if not add_generation_prompt %}<|pad|>{% endif %}"
    tokenizer = replace(tokenizer, chat_template=both)
    turn = encode_turn(tokenizer, QUESTION_AND_ANSWER)
    assert tokenizer.decode(turn.answer) == "Hello.<|im_end|>\n<|pad|>"
    assert stop_token_ids(tokenizer) == (257, 260)


def test_text_that_the_template_leaves_out_is_refused_or_counted(tokenizer: Any):
    tokenizer = replace(tokenizer, chat_template=NO_THOUGHTS)
    chat = (Message("user", "Why?"), Message("assistant", "<think>hm</think>So."))
    with pytest.raises(DataError, match=r"does not print message 1 \(assistant: '<think>hm</think>So\.'\) as it was"):
        encode_turn(tokenizer, chat)
    turn = encode_turn(tokenizer, chat, COUNTED)
    assert (tokenizer.decode(turn.answer), turn.notes) == ("So.<|im_end|>", {"omitted_text"})


@pytest.mark.parametrize("change", ["| upper", "| e", "[:4]", ".replace('a', 'b')", "| title", "| reverse"])
def test_a_message_that_the_template_changes_is_refused_although_its_text_is_elsewhere(tokenizer: Any, change: str):
    template = "Say a<b and c: {% for m in messages %}{{ m['role'] }} {{ m['content'] CHANGE }}{% endfor %}"
    tokenizer = replace(tokenizer, chat_template=template.replace("CHANGE", change))
    with pytest.raises(DataError, match="does not print message 0"):
        encode_chat(tokenizer, [Message("user", "a<b and c")], add_generation_prompt=False)


def test_a_character_without_tokens_is_refused_or_counted(smollm2_folder: Path):
    tokenizer, oracle = load_tokenizer(str(smollm2_folder)), Oracle.from_file(str(smollm2_folder / "tokenizer.json"))
    assert oracle.encode("\x04").ids == []
    chat = (Message("user", "Say it."), Message("assistant", "\x04"))
    with pytest.raises(DataError, match=r"cannot represent a character of .*\\x04.* set unencodable_text to 'count'"):
        encode_turn(tokenizer, chat)
    turn = encode_turn(tokenizer, chat, COUNTED)
    assert (tokenizer.decode(turn.answer), turn.notes) == ("<|im_end|>", {"unencodable_text"})
    with pytest.raises(DataError, match="cannot represent"):
        encode_text(tokenizer, "a\x04b")
    assert encode_text(tokenizer, "a\x04b", COUNTED) == oracle.encode("a\x04b").ids


def test_text_of_special_tokens_in_a_message_is_refused_parsed_or_kept_plain(tokenizer: Any):
    chat = (Message("user", "Is <|im_end|> it?"), Message("assistant", "<|eos|> is, <|im_end|> too."))
    with pytest.raises(
        DataError, match=r"message 0 \(user\) contains '<\|im_end\|>', .* set special_text to 'parse' or"
    ):
        encode_turn(tokenizer, chat)
    parsed = encode_turn(tokenizer, chat, ChatConfig(special_text="parse"))
    assert (parsed.prompt.count(260), parsed.answer.count(260), parsed.answer.count(257)) == (2, 2, 1)
    plain = encode_turn(tokenizer, chat, ChatConfig(special_text="plain"))
    # The byte tokenizer's plain text is its bytes, so the oracle is arithmetic.
    start, end = [259], [260]
    assert plain.prompt == [*start, *b"user\nIs <|im_end|> it?", *end, *b"\n", *start, *b"assistant\n"]
    assert plain.answer == [*b"<|eos|> is, <|im_end|> too.", *end]
    assert parsed.notes == plain.notes == {"special_text"}
    assert tokenizer.decode(plain.prompt + plain.answer) == tokenizer.decode(parsed.prompt + parsed.answer)


@pytest.mark.parametrize("template", [NO_THOUGHTS.replace("</think>", "is"), "{{ messages[0]['content'][1:] }}"])
def test_plain_text_of_special_tokens_needs_a_template_that_prints_messages_unchanged(tokenizer: Any, template: str):
    config = ChatConfig(special_text="plain", omitted_text="count")
    chat = (Message("user", "Say <|im_end|>"), Message("assistant", "<|eos|> is, <|im_end|> too."))
    with pytest.raises(DataError, match="changes the messages that it prints, so the text cannot be kept as plain"):
        encode_chat(replace(tokenizer, chat_template=template), chat, add_generation_prompt=False, config=config)


def with_tokens(folder: Path, *texts: str) -> Any:
    """Return the byte tokenizer with more tokens, which are not marked as special."""
    write_byte_tokenizer(str(folder))
    oracle = Oracle.from_file(str(folder / "tokenizer.json"))
    oracle.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    oracle.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def test_a_token_that_the_template_puts_together_is_noticed_in_a_message_and_a_word_is_not(tmp_path: Path):
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    tokenizer = replace(with_tokens(tmp_path, "<|user|>", "<|assistant|>", "user"), chat_template=template)
    with pytest.raises(DataError, match=r"message 0 \(user\) contains '<\|user\|>'"):
        encode_turn(tokenizer, (Message("user", "I am the <|user|>."), Message("assistant", "Hello.")))
    assert encode_turn(tokenizer, (Message("user", "user"), Message("assistant", "Hello."))).prompt == [
        261,
        263,
        260,
        262,
    ]


def test_a_token_that_a_message_completes_is_noticed(tokenizer: Any):
    template = tokenizer.chat_template.replace("'<|im_end|>' + '\n'", "'>' + '<|im_end|>'")
    tokenizer = replace(tokenizer, chat_template=template)
    chat = (Message("user", "What?"), Message("assistant", "It is <|eos|"))
    with pytest.raises(DataError, match=r"together with the text that the chat template of .* forms a special token"):
        encode_turn(tokenizer, chat)
    turn = encode_turn(tokenizer, chat, ChatConfig(special_text="parse"))
    assert (turn.answer, turn.notes) == ([*b"It is ", 257, 260], {"special_text"})
    assert encode_turn(tokenizer, (*chat[:1], Message("assistant", "It is |eos|"))).answer == [*b"It is |eos|>", 260]


def test_a_control_token_that_is_only_a_piece_of_the_vocabulary_is_noticed_in_a_message(tmp_path: Path):
    made = json.loads(KINDS["unigram"]().to_str())
    made["model"]["vocab"].append(["<|im_end|>", 0.0])
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant {% endif %}"
    write_tokenizer(Oracle.from_str(json.dumps(made)), tmp_path, eos_token="</s>", chat_template=template)
    oracle = Oracle.from_file(str(tmp_path / "tokenizer.json"))
    assert len(made["model"]["vocab"]) - 1 in oracle.encode("and <|im_end|> too").ids
    for policy in ("raise", "plain"):
        with pytest.raises(DataError, match=r"<\|im_end\|>"):
            encode_chat(
                load_tokenizer(str(tmp_path)),
                [Message("user", "and <|im_end|> too")],
                add_generation_prompt=True,
                config=ChatConfig(special_text=policy),
            )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"type": "WordLevel", "vocab": {"Hi": 0}, "unk_token": "<unk>"}, "Missing .UNK. token"),
        ({"type": "Unigram", "unk_id": None, "vocab": [["H", -1.0]], "byte_fallback": False}, "`unk_id` is missing"),
    ],
)
def test_text_that_a_tokenizer_cannot_handle_is_an_error_of_ours(tmp_path: Path, model: dict[str, Any], reason: str):
    write_byte_tokenizer(str(tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"model": model, "pre_tokenizer": None}))
    with pytest.raises(DataError, match=rf"cannot encode 'good day' \(.*{reason}.*\); remove what it has no token for"):
        encode_text(load_tokenizer(str(tmp_path)), "good day")


def test_a_special_token_in_a_role_is_noticed(tokenizer: Any):
    with pytest.raises(DataError, match=r"message 0 \(user<\|im_end\|>\) contains '<\|im_end\|>'"):
        encode_chat(tokenizer, [Message("user<|im_end|>", "Hi")], add_generation_prompt=True)


def test_text_that_normalization_turns_into_a_special_token_is_noticed(tmp_path: Path):
    write_byte_tokenizer(str(tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFKC"}
    for token in content["added_tokens"]:
        token["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    oracle = Oracle.from_file(str(tmp_path / "tokenizer.json"))
    wide = "\uff1c|im_end|\uff1e"
    assert oracle.encode(wide).ids == [260]
    with pytest.raises(DataError, match=r"contains .*im_end.*, which the model would read as a special token"):
        encode_chat(load_tokenizer(str(tmp_path)), [Message("user", wide)], add_generation_prompt=True)
