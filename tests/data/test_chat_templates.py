"""Every template with every conversation: the tokens of one rendering, tokenized once, or a refusal.

The expected text is transformers' rendering. The expected ids are those of the `tokenizers` library for tokenizer.json.
"""

import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chat_templates import CONVERSATIONS, TEMPLATES
from tokenizer_kinds import KINDS, write_tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Oracle

from simpo_pipeline.data.chat import EncodedTurn, encode_turn, load_tokenizer
from simpo_pipeline.data.config import ChatConfig
from simpo_pipeline.data.messages import Message
from simpo_pipeline.data.template import ChatTemplate
from simpo_pipeline.data.tokenizer import Tokenizer
from simpo_pipeline.errors import DataError

DATE = "2024-07-26"
ROLES = {"bos_token": "<s>", "eos_token": "</s>"}
MERGED_BORDER = "merged border"
# They write the beginning of the assistant's turn whether it is asked for or not.
OPEN_ANOTHER_TURN = (TEMPLATES["chatml that always adds the prompt"],)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
Render = Callable[[str, Sequence[Message], bool], str]


class Case(NamedTuple):
    """A template with a conversation, and its prompt and whole text; None if it cannot be rendered."""

    name: str
    template: str
    messages: tuple[Message, ...]
    texts: tuple[str, str] | None


@pytest.fixture(params=["single_bytes", *KINDS])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Oracle]:
    """A tokenizer of this project, and of the library for the same file."""
    special = {"single_bytes": _single_bytes, "unigram": _unigram}
    made = Oracle.from_str(special[request.param]()) if request.param in special else KINDS[request.param]()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    write_tokenizer(made, tmp_path, **ROLES)
    return load_tokenizer(str(tmp_path)), Oracle.from_file(str(tmp_path / "tokenizer.json"))


def _single_bytes() -> str:
    """Return a byte-level tokenizer.json without merges, and without the byte 0x01."""
    made = json.loads(KINDS["byte_level"]().to_str())
    made["added_tokens"], made["model"]["merges"] = [], []
    single = [token for token in made["model"]["vocab"] if len(token) == 1 and token != "ā"]
    made["model"]["vocab"] = {token: index for index, token in enumerate(single)}
    return json.dumps(made)


def _unigram() -> str:
    """Return a unigram tokenizer.json with a piece for each character of ASCII."""
    made = json.loads(KINDS["unigram"]().to_str())
    known = {piece for piece, _ in made["model"]["vocab"]}
    made["model"]["vocab"] += [[chr(code), -20.0] for code in range(128) if chr(code) not in known]
    return json.dumps(made)


@pytest.fixture(scope="module")
def render() -> Iterator[Render]:
    """transformers' renderer, on a fixed day."""
    with pytest.MonkeyPatch.context() as patch:
        from transformers.utils import chat_template_utils

        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> "Day":
                return cls.fromisoformat(DATE)

        patch.setattr(chat_template_utils, "datetime", Day)

        def render(template: str, messages: Sequence[Message], add_generation_prompt: bool) -> str:
            roles: dict[str, Any] = dict(ROLES)
            chat = [{"role": message.role, "content": message.content} for message in messages]
            rendered, _ = chat_template_utils.render_jinja_template(
                [chat], chat_template=template, add_generation_prompt=add_generation_prompt, **roles
            )
            return rendered[0]

        yield render


@pytest.fixture(scope="module")
def cases(render: Render) -> list[Case]:
    """Every template with every conversation, and what transformers renders."""
    found: list[Case] = []
    for name, template in TEMPLATES.items():
        for title, messages in CONVERSATIONS.items():
            try:
                texts = render(template, messages[:-1], True), render(template, messages, False)
            except Exception:
                texts = None
            found.append(Case(f"{name}, {title}", template, messages, texts))
    return found


def ids(oracle: Oracle, text: str) -> list[int]:
    return oracle.encode(text, add_special_tokens=False).ids


def reason_to_refuse(oracle: Oracle, case: Case) -> str | None:
    """Return why a conversation has no exact tokens, or None. Nearly all is read from the rendered texts."""
    if not case.template:
        return "no template"
    if any(token in message.content for message in case.messages for token in SPECIAL):
        return "special token"
    if case.texts is None:
        return "error"
    prompt, whole = case.texts
    if not whole.startswith(prompt):
        return "another prompt"
    if not all(message.content.strip() in whole for message in case.messages):
        return "text left out"
    if case.template in OPEN_ANOTHER_TURN:
        return "another turn"
    decoded = oracle.decode(ids(oracle, whole), skip_special_tokens=False)
    # Some tokenizers put blanks between words and special tokens.
    if decoded.replace(" ", "") != whole.replace(" ", ""):
        return "text lost"
    start = ids(oracle, prompt)
    return None if ids(oracle, whole)[: len(start)] == start else MERGED_BORDER


def check_turn(turn: EncodedTurn, oracle: Oracle, prompt: str, whole: str) -> None:
    expected = ids(oracle, whole)
    found = turn.prompt + turn.answer
    assert turn.prompt == ids(oracle, prompt)
    if "merged_border" in turn.notes:
        assert found[: len(turn.prompt)] != expected[: len(turn.prompt)]
        text, all_text = (oracle.decode(tokens, skip_special_tokens=False) for tokens in (found, expected))
    else:
        assert found == expected[: len(found)]
        text, all_text = found, expected
        assert oracle.decode(expected[len(found) :], skip_special_tokens=False).strip() == ""
    assert all_text[: len(text)] == text


def test_there_are_at_least_forty_templates():
    assert len(TEMPLATES) >= 40
    assert len(set(TEMPLATES.values())) == len(TEMPLATES)


def test_tokens_are_those_of_the_text_rendered_and_tokenized_once_or_the_conversation_is_refused(
    kind: tuple[Tokenizer, Oracle], cases: list[Case], request: pytest.FixtureRequest
):
    tokenizer, oracle = kind
    counts: Counter[str] = Counter()
    config = ChatConfig(date=DATE)
    templated = {template: replace(tokenizer, chat_template=template) for template in TEMPLATES.values()}
    # Byte tokens and pieces with blanks are the two extremes; a fifth of the cases is enough for those between.
    thorough = request.node.callspec.params["kind"] in ("single_bytes", "byte_fallback")
    for case in cases if thorough else cases[::5]:
        reason = reason_to_refuse(oracle, case)
        try:
            turn = encode_turn(templated[case.template], case.messages, config)
        except DataError as error:
            assert reason is not None, f"{case.name}: {error}"
            assert "\n" not in str(error)
            counts[reason] += 1
            if reason != MERGED_BORDER:
                continue
            turn = encode_turn(templated[case.template], case.messages, replace(config, merged_border="count"))
            assert "merged_border" in turn.notes
        else:
            assert reason is None, f"{case.name}: accepted in spite of {reason}"
            assert "merged_border" not in turn.notes
            counts["kept"] += 1
        assert case.texts is not None
        is_trimmed = not all(message.content in case.texts[1] for message in case.messages)
        assert turn.notes - {"merged_border"} == ({"trimmed_text"} if is_trimmed else frozenset())
        check_turn(turn, oracle, *case.texts)
    reasons = ("error", "another prompt", "text left out", "special token")
    assert min(counts[reason] for reason in reasons) > 3, counts
    assert counts["kept"] > 80, counts


def test_every_rendering_equals_that_of_transformers(cases: list[Case]):
    templates = {source: ChatTemplate(source, name, ROLES) for name, source in TEMPLATES.items()}
    num_equal = 0
    for case in cases:

        def render(case: Case = case) -> tuple[str, str]:
            template = templates[case.template]
            prompt = template.render(case.messages[:-1], add_generation_prompt=True, date=DATE)
            return prompt, template.render(case.messages, add_generation_prompt=False, date=DATE)

        if case.texts is None:
            with pytest.raises(DataError, match=r"the chat template of .* rejects a conversation of "):
                render()
        else:
            assert render() == case.texts, case.name
            num_equal += 1
    assert num_equal > 500
