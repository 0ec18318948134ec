"""Folders of tokenizers: tokenizer.json determines the ids, and what contradicts it or needs code is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, write_tokenizer
from tokenizers import Tokenizer as Oracle
from tokenizers import processors

from simpo_pipeline.data.byte_tokenizer import write_byte_tokenizer
from simpo_pipeline.data.chat import encode_text, encode_turn, load_tokenizer, stop_token_ids
from simpo_pipeline.data.messages import Message
from simpo_pipeline.errors import DataError

TEXTS = (
    "Steps:\n\n1.",
    "2023 is\n\n\n- one,  two",
    " blank",
    "<|im_start|>user\nHi<|im_end|>\n",
    "é東🎉 def f(a):\n\treturn",
)
CLASSES = ("GPT2Tokenizer", "LlamaTokenizerFast", "NoSuchTokenizer", 7)


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the byte tokenizer."""
    write_byte_tokenizer(str(tmp_path))
    return tmp_path


def test_the_ids_are_those_of_tokenizer_json_whatever_class_the_config_names(smollm2_folder: Path, tmp_path: Path):
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / file).write_bytes((smollm2_folder / file).read_bytes())
    oracle = Oracle.from_file(str(tmp_path / "tokenizer.json"))
    expected = [oracle.encode(text).ids for text in TEXTS]
    for name in CLASSES:
        edit_json(tmp_path, "tokenizer_config.json", tokenizer_class=name, add_prefix_space=True, do_lower_case=True)
        tokenizer = load_tokenizer(str(tmp_path))
        assert [tokenizer.encode(text) for text in TEXTS] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_each_kind_has_the_librarys_ids(tmp_path: Path, kind: str):
    write_tokenizer(KINDS[kind](), tmp_path)
    oracle, tokenizer = Oracle.from_file(str(tmp_path / "tokenizer.json")), load_tokenizer(str(tmp_path))
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(
            oracle.encode(text).ids, skip_special_tokens=False
        )


def test_a_text_is_never_cut_or_padded_as_tokenizer_json_was_saved(folder: Path):
    content = json.loads((folder / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 258}
    (folder / "tokenizer.json").write_text(
        json.dumps(content | {"truncation": cut, "padding": {**padding, "pad_type_id": 0, "pad_token": "<|pad|>"}})
    )
    assert load_tokenizer(str(folder)).encode("Hello") == list(b"Hello")


CONFIG = "tokenizer_config.json"
# The file to change; the keys to set, the whole text, or None to remove the file; and a part of the message.
REFUSED: list[tuple[str, dict[str, Any] | str | None, str]] = [
    ("tokenizer.json", None, r"has no tokenizer\.json .*save_pretrained"),
    ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", r"tokenizer\.json is no tokenizer"),
    ("tokenizer.json", "{", r"tokenizer\.json is no tokenizer"),
    ("tokenizer.json", "{}", r"tokenizer\.json is no tokenizer"),
    (CONFIG, "[]", "contains list in JSON"),
    (CONFIG, "{,}", r"tokenizer_config\.json is not JSON"),
    ("config.json", '"\udce9"', r"config\.json cannot be read as UTF-8"),
    (CONFIG, {"auto_map": {"AutoTokenizer": ["code.T", None]}}, "has auto_map, .* never run"),
    ("config.json", {"auto_map": {"AutoTokenizer": "code.T"}}, "has auto_map"),
    (CONFIG, {"eos_token": "</s>"}, "eos_token is '</s>', but tokenizer.json does not have it"),
    (CONFIG, {"eos_token": 2}, r"eos_token of tokenizer_config\.json is 2; expected the text of a token"),
    (CONFIG, {"bos_token": ""}, "bos_token of .* is ''; expected"),
    ("special_tokens_map.json", {"eos_token": {"content": "<|pad|>"}}, "the two files must agree"),
    (CONFIG, {"added_tokens_decoder": {"12": {"content": "<|im_end|>"}}}, "the id 12, but its id in .* is 260"),
    (CONFIG, {"added_tokens_decoder": {"261": {"content": "<|new|>"}}}, "the id 261, but its id in .* is None"),
    (CONFIG, {"added_tokens_decoder": 1}, "added_tokens_decoder of .* is 1; expected an object"),
    (CONFIG, {"additional_special_tokens": ["<|tool|>"]}, "tokenizer.json does not have it"),
    (CONFIG, {"extra_special_tokens": {"tool_token": "<|tool|>"}}, "tokenizer.json does not have it"),
    (CONFIG, {"extra_special_tokens": "<|tool|>"}, "expected a list of tokens"),
    (CONFIG, {"split_special_tokens": True}, "split_special_tokens, which contradicts"),
    (CONFIG, {"add_bos_token": "no"}, "add_bos_token of .* is 'no'; expected true or false"),
    (
        CONFIG,
        {"chat_template": [{"name": "tool_use", "template": "a"}]},
        "templates tool_use, and none",
    ),
    (CONFIG, {"chat_template": ["a"]}, "chat_template of .* contains 'a'; expected an object with a name of its own"),
    (CONFIG, {"chat_template": [{"name": "default"}]}, "contains {'name': 'default'}; expected"),
    (
        CONFIG,
        {"chat_template": [{"name": "default", "template": "a"}, {"name": "default", "template": "b"}]},
        "contains {'name': 'default', 'template': 'b'}; expected an object with a name of its own",
    ),
    (CONFIG, {"chat_template": "\ufeffa"}, r"template in tokenizer_config\.json begins with a byte order mark"),
    ("chat_template.jinja", "\ufeffa", r"template in chat_template\.jinja begins with a byte order mark"),
    (CONFIG, '{"a": {"b": 1, "b": 2}}', r"tokenizer_config\.json is not JSON \(the key 'b' occurs twice\)"),
    ("generation_config.json", '{"eos_token_id": 1, "eos_token_id": 2}', "the key 'eos_token_id' occurs twice"),
    (CONFIG, "[" * 100_000, "is not JSON .*recursion"),
    (CONFIG, {"additional_special_tokens": ["\ud800"]}, "expected the text of a token"),
    (CONFIG, {"chat_template": 1}, "chat_template of .* is 1; expected"),
    (
        "generation_config.json",
        {"eos_token_id": "2"},
        r"eos_token_id of generation_config\.json is '2'; expected",
    ),
    ("config.json", {"eos_token_id": [1, -1]}, r"eos_token_id of config\.json is \[1, -1\]"),
    ("config.json", {"eos_token_id": True}, r"eos_token_id of config\.json is True"),
]


@pytest.mark.parametrize(("file", "change", "message"), REFUSED)
def test_a_folder_that_cannot_be_read_exactly_is_refused(
    folder: Path, file: str, change: dict[str, Any] | str | None, message: str
):
    (folder / "special_tokens_map.json").unlink()
    if isinstance(change, dict):
        edit_json(folder, file, **change)
    elif change is not None:
        (folder / file).write_bytes(change.encode(errors="surrogateescape"))
    else:
        (folder / file).unlink()
    with pytest.raises(DataError, match=message) as refusal:
        load_tokenizer(str(folder))
    assert str(refusal.value).startswith(str(folder))
    assert "\n" not in str(refusal.value)


JUNK = st.sampled_from(
    [None, True, 0, -1, 2**40, 10**30, 1.5, "", "x", "<|im_end|>", "\ud800", "{{ x", [], [1], [[]], {}, {"content": 1}]
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths to all values inside a JSON value, apart from the vocabulary."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        if key != "vocab":
            yield from places(inner, (*path, key))


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(("tokenizer.json", CONFIG, "special_tokens_map.json")), data=st.data())
def test_with_anything_in_its_files_a_tokenizer_fails_only_with_an_error_of_ours(
    folder: Path, file: str, data: st.DataObject
):
    write_byte_tokenizer(str(folder))
    content = json.loads((folder / file).read_text())
    *path, last = data.draw(st.sampled_from(list(places(content))))
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(JUNK)
    (folder / file).write_text(json.dumps(content))
    try:
        tokenizer = load_tokenizer(str(folder))
        stop_token_ids(tokenizer)
        encode_turn(tokenizer, (Message("user", "Hi"), Message("assistant", "Hello.")))
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json"])
def test_a_link_without_its_target_and_a_pipe_are_refused_instead_of_ignored(folder: Path, name: str):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / "absent")
    with pytest.raises(DataError, match=f"{name} is not a file, or a link to a file that is missing"):
        load_tokenizer(str(folder))
    os.mkfifo(folder / "absent")
    with pytest.raises(DataError, match=f"{name} is not a file"):
        load_tokenizer(str(folder))


def test_ids_that_depend_on_chance_are_refused(folder: Path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"has a dropout of 0\.1.*, so the same text would get other ids each time"):
        load_tokenizer(str(folder))


def test_a_post_processor_that_fails_is_an_error_of_ours(folder: Path):
    content = json.loads((folder / "tokenizer.json").read_text())
    pieces = [{"SpecialToken": {"id": "<|absent|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="has a post_processor that fails"):
        encode_text(load_tokenizer(str(folder)), "Hi")


def test_two_tokens_with_one_id_are_refused(folder: Path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["ab"] = 258
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json gives several tokens the same id"):
        load_tokenizer(str(folder))


def test_a_class_without_tokenizer_json_is_refused_naming_the_file_to_convert(folder: Path):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    edit_json(folder, CONFIG, tokenizer_class="LlamaTokenizerFast")
    with pytest.raises(DataError, match=r"has no tokenizer\.json \(it has tokenizer\.model\); .*convert it once"):
        load_tokenizer(str(folder))


def test_code_of_a_folder_is_neither_run_nor_asked_about(folder: Path):
    edit_json(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    code = "import sys; from simpo_pipeline.data.chat import load_tokenizer; load_tokenizer(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, input="y\n")
    assert done.returncode == 1
    assert "DataError" in done.stderr.splitlines()[-1]
    assert "it ran" not in done.stderr and "[y/N]" not in done.stdout


def test_the_template_named_default_is_used_and_a_jinja_file_wins(folder: Path):
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    edit_json(folder, "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(str(folder)).chat_template == "b"
    (folder / "chat_template.jinja").write_text("c")
    assert load_tokenizer(str(folder)).chat_template == "c"


def test_a_hub_id_loads_only_the_tokenizers_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_tokenizer("owner/name@abc").encode("Hi") == [72, 105]
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc")
    assert not any("*" in pattern or pattern.endswith((".py", ".safetensors")) for pattern in asked["allow_patterns"])


def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    def snapshot(name: str, **options: Any) -> str:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(DataError, match=r"owner/name: there is no such folder, .*no route to host\); check the name"):
        load_tokenizer("owner/name")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [256, 72, 105]),
        ({"add_eos_token": True}, [256, 72, 105]),
        ({"add_bos_token": True, "add_eos_token": True}, [256, 72, 105]),
        ({"add_bos_token": False}, [72, 105]),
    ],
)
def test_no_end_token_follows_a_text_that_is_to_be_continued(folder: Path, flags: dict[str, bool], expected: list[int]):
    oracle = Oracle.from_file(str(folder / "tokenizer.json"))
    tokens = [("<|bos|>", 256), ("<|eos|>", 257)]
    oracle.post_processor = processors.TemplateProcessing(single="<|bos|> $A <|eos|>", special_tokens=tokens)
    oracle.save(str(folder / "tokenizer.json"))
    assert oracle.encode("Hi").ids == [256, 72, 105, 257]
    edit_json(folder, "tokenizer_config.json", **flags)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.encode("Hi") == encode_text(tokenizer, "Hi") == expected
    assert tokenizer.encode("Hi", add_special_tokens=False) == [72, 105]


def test_generation_stops_at_the_end_tokens_of_all_files(folder: Path):
    edit_json(folder, "config.json", eos_token_id=9)
    edit_json(folder, "generation_config.json", eos_token_id=[257, 10])
    assert stop_token_ids(load_tokenizer(str(folder))) == (9, 10, 257, 260)


def test_an_end_of_turn_that_is_not_marked_special_stops_generation_too(folder: Path):
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit_json(folder, "tokenizer_config.json", additional_special_tokens=[])
    assert stop_token_ids(load_tokenizer(str(folder))) == (257, 260)


def test_an_end_of_turn_that_is_only_a_piece_of_the_vocabulary_stops_generation_too(tmp_path: Path):
    made = json.loads(KINDS["unigram"]().to_str())
    made["model"]["vocab"].append(["<|im_end|>", 0.0])
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}assistant "
    edit_json(tmp_path, "tokenizer_config.json", chat_template=template.replace("assistant ", ""), eos_token="</s>")
    oracle = Oracle.from_file(str(tmp_path / "tokenizer.json"))
    end = made["model"]["vocab"].index(["<|im_end|>", 0.0])
    assert oracle.encode("answer<|im_end|>").ids[-1] == end
    assert stop_token_ids(load_tokenizer(str(tmp_path))) == tuple(sorted((oracle.encode("</s>").ids[-1], end)))
