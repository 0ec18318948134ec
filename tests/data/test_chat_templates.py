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


def reason_to_refuse(oracle: Oracle, case: Case) -> str | None:
    """Return why a conversation has no exact tokens, or None. Everything is read from the rendered texts."""
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
    decoded = oracle.decode(oracle.encode(whole, add_special_tokens=False).ids, skip_special_tokens=False)
    # Some tokenizers put blanks between words and special tokens.
    return None if decoded.replace(" ", "") == whole.replace(" ", "") else "text lost"


def check_turn(turn: EncodedTurn, oracle: Oracle, prompt: str, whole: str) -> None:
    expected = oracle.encode(whole, add_special_tokens=False).ids
    found = turn.prompt + turn.answer
    assert turn.prompt == oracle.encode(prompt, add_special_tokens=False).ids
    if "merged_border" in turn.notes:
        assert found[: len(turn.prompt)] != expected[: len(turn.prompt)]
        text, all_text = (oracle.decode(ids, skip_special_tokens=False) for ids in (found, expected))
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
            continue
        assert reason is None, f"{case.name}: accepted in spite of {reason}"
        assert case.texts is not None
        check_turn(turn, oracle, *case.texts)
        counts["kept"] += 1
        counts.update(turn.notes)
    reasons = ("error", "another prompt", "text left out", "special token")
    assert min(counts[reason] for reason in reasons) > 3, counts
    assert counts["kept"] > 80, counts


def test_every_rendering_equals_that_of_transformers(render: Render):
    num_equal = 0
    for name, source in TEMPLATES.items():
        template = ChatTemplate(source, name, ROLES)
        for messages in CONVERSATIONS.values():
            for prompted in (False, True):
                try:
                    expected = render(source, messages, prompted)
                except Exception:
                    with pytest.raises(DataError, match=f"the chat template of {name!r} rejects a conversation of "):
                        template.render(messages, add_generation_prompt=prompted, date=DATE)
                    continue
                assert template.render(messages, add_generation_prompt=prompted, date=DATE) == expected, name
                num_equal += 1
    assert num_equal > 1000
