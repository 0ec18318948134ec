"""Conversion of chat messages to token ids: one rendering, one tokenization, and the border of the answer in it.

Also finds the tokens that end a turn.

Invariant: for every conversation that ends in an answer, the prompt's tokens are exactly those generation starts from:
`encode_turn(t, messages).prompt == encode_chat(t, messages[:-1], add_generation_prompt=True)`.

Text of a message that the model would not read as it was written is refused, or counted under a policy of `ChatConfig`.
This module does not know preference pairs, models or batches.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from simpo_pipeline.data.config import DEFAULT_CHAT, ChatConfig
from simpo_pipeline.data.messages import Message
from simpo_pipeline.data.tokenizer import Tokenizer
from simpo_pipeline.data.tokenizer_files import read_tokenizer, tokenizer_folder
from simpo_pipeline.errors import DataError

Note = Literal["special_text", "omitted_text", "unencodable_text", "merged_border"]
"""Something about a conversation that is counted. `merged_border`: tokenized at once, the end of the prompt and the
beginning of the answer would share a token."""

_PROBE = (Message("user", "question"), Message("assistant", "answer"))
# The end of a turn depends neither on the date nor on what the template leaves out.
_PROBE_CONFIG = ChatConfig("2000-01-01", special_text="parse", omitted_text="count", unencodable_text="count")
# A piece of the vocabulary that is written like a control token, but not one of the 256 bytes.
_CONTROL_LIKE = re.compile(r"<(?!0x[0-9A-F]{2}>).+>|\[.+\]")
# Marks around the text of each message, from a plane of Unicode for private use: an even one before, an odd one after.
_MARKS = re.compile("[\U00100000-\U0010fffd]")
_FIRST_MARK = 0x100000
# Text before an answer that is tokenized separately, so that the tokenizer does not take it for the start of a text.
_TEXTS_BEFORE = ("", "\n", ".", "a", "0")
_MERGED_BORDER: frozenset[Note] = frozenset(("merged_border",))
_UNENCODABLE_TEXT: frozenset[Note] = frozenset(("unencodable_text",))


@dataclass(frozen=True)
class EncodedTurn:
    """Tokens of a conversation, split where the last answer begins; the answer ends with its end-of-turn token."""

    prompt: list[int]
    answer: list[int]
    notes: frozenset[Note] = frozenset()


@dataclass(frozen=True)
class _Rendered:
    """Text of a conversation, with the ranges of control tokens in it that are ordinary text."""

    text: str
    plain: tuple[tuple[int, int], ...]
    notes: frozenset[Note]


def load_tokenizer(path: str) -> Tokenizer:
    """Load the tokenizer at a local folder, an fsspec folder (`gs://...`) or a hub id (`owner/name`, `owner/name@rev`).

    Raises:
        DataError: there is no tokenizer, its files contradict each other, or it needs code of the folder.
        StorageError: the folder cannot be read.
    """
    with tokenizer_folder(path) as folder:
        return read_tokenizer(folder, path)


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool, config: ChatConfig = DEFAULT_CHAT
) -> list[int]:
    """Return the tokens of the rendered conversation.

    With `add_generation_prompt`, the opening of an assistant turn follows the messages.

    Raises:
        DataError: the chat template rejects the messages, or the model would read other text than the messages have.
    """
    rendered = _render(tokenizer, messages, add_generation_prompt, config)
    return _encode(tokenizer, rendered, config)[0]


def encode_text(tokenizer: Tokenizer, text: str, config: ChatConfig = DEFAULT_CHAT) -> list[int]:
    """Return the tokens of a text to continue, without chat template; special tokens in it are parsed.

    They begin with the token that the tokenizer puts before a text (BOS), if any, and never end with one that ends it.

    Raises:
        DataError: the tokenizer cannot represent the text.
    """
    tokens, _ = _encode(tokenizer, _Rendered(text, (), frozenset()), config)
    return [*tokenizer.first_tokens, *tokens]


def encode_turn(tokenizer: Tokenizer, messages: Sequence[Message], config: ChatConfig = DEFAULT_CHAT) -> EncodedTurn:
    """Return the tokens of a conversation, split before its last turn.

    White space that the template writes after the end-of-turn token is excluded: generation stops before it.
    If the tokenizer merges text across the border (an answer that begins with a line break), the answer is tokenized
    separately, because generation starts from the prompt's own tokens; the turn is then noted as `merged_border`.

    Raises:
        DataError: the template rejects the messages, or renders the prompt differently when the answer follows; or the
            model would read other text than the messages have.
    """
    prompt, answer, notes = _split(tokenizer, messages, config)
    return EncodedTurn(prompt, _cut_after_turn(tokenizer, answer), notes)


def stop_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of the tokens that end a generated turn, in ascending order.

    These are the end-of-turn token of the template, and the end-of-sequence tokens of the tokenizer, of config.json and
    of generation_config.json. They may differ: Llama 3 ends a turn with a different token than a text.

    Raises:
        DataError: the chat template rejects a question with an answer.
    """
    ends = set(tokenizer.model_end_ids)
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if tokenizer.chat_template and (end_of_turn := _end_of_turn(tokenizer)) is not None:
        ends.add(end_of_turn)
    return tuple(sorted(ends))


def pad_token_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that pads rows at their end. Any token works, because masks exclude padding."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0


def _split(
    tokenizer: Tokenizer, messages: Sequence[Message], config: ChatConfig
) -> tuple[list[int], list[int], frozenset[Note]]:
    """Return the tokens before the last turn and the others, with what the template writes after the turn."""
    before = _render(tokenizer, messages[:-1], True, config)
    whole = _render(tokenizer, messages, False, config)
    _check_prompt_is_prefix(tokenizer, before.text, whole.text)
    full, notes = _encode(tokenizer, whole, config)
    prompt = tokenizer.encode_with_plain(before.text, before.plain)
    if full[: len(prompt)] == prompt:
        return prompt, full[len(prompt) :], notes
    answer = _encode_after(tokenizer, prompt, len(before.text), whole, full)
    return prompt, answer, notes | _MERGED_BORDER


def _encode(tokenizer: Tokenizer, rendered: _Rendered, config: ChatConfig) -> tuple[list[int], frozenset[Note]]:
    tokens = tokenizer.encode_with_plain(rendered.text, rendered.plain)
    lost = tokenizer.first_lost_text(rendered.text, tokens)
    if lost is None:
        return tokens, rendered.notes
    if config.unencodable_text == "raise":
        raise DataError(
            f"the tokenizer {tokenizer.name!r} cannot represent a character of {lost!r}, so the model would read other "
            f"text; remove the character, or set unencodable_text to 'count'"
        )
    return tokens, rendered.notes | _UNENCODABLE_TEXT


def _encode_after(tokenizer: Tokenizer, prompt: list[int], border: int, whole: _Rendered, full: list[int]) -> list[int]:
    """Return tokens of the text from `border` on that follow the prompt's tokens, which are no prefix of `full`.

    A tokenizer may put a blank before the first word of a text, but the answer is not the start of a text. So it is
    tokenized after other text, unless prompt and answer decode to the whole text without.
    """
    wanted = tokenizer.decode(full)
    for before in _TEXTS_BEFORE:
        shift = len(before) - border
        plain = [(start + shift, end + shift) for start, end in whole.plain if start >= border]
        first = tokenizer.encode(before, add_special_tokens=False)
        tokens = tokenizer.encode_with_plain(before + whole.text[border:], plain)
        answer = tokens[len(first) :]
        if tokens[: len(first)] == first and tokenizer.decode([*prompt, *answer]) == wanted:
            return answer
    raise DataError(
        f"the tokenizer {tokenizer.name!r} merges the end of the prompt with the beginning of the answer "
        f"{whole.text[border : border + 40]!r}, and has no tokens for the answer alone; training needs a template "
        f"whose prompt, with add_generation_prompt, ends where a token ends"
    )


def _check_prompt_is_prefix(tokenizer: Tokenizer, prompt: str, whole: str) -> None:
    if not whole.startswith(prompt):
        same = next(i for i, character in enumerate(prompt) if whole[i : i + 1] != character)
        raise DataError(
            f"the chat template of {tokenizer.name!r} renders the prompt differently when the answer follows: "
            f"{prompt[same : same + 40]!r} becomes {whole[same : same + 40]!r} at character {same}; training "
            f"needs a template whose prompt, with add_generation_prompt, is a prefix of the whole conversation"
        )


def _render(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool, config: ChatConfig
) -> _Rendered:
    """Return the text of a conversation, checked for special tokens in messages and for text that is left out."""
    special = [at for at, message in enumerate(messages) if _control_text(tokenizer, message) is not None]
    if special and config.special_text == "raise":
        message = messages[special[0]]
        raise DataError(
            f"message {special[0]} ({message.role}) contains {_control_text(tokenizer, message)!r}, which the model "
            f"would read as a special token of {tokenizer.name!r}; remove it, or set special_text to 'parse' or 'plain'"
        )
    text = tokenizer.template.render(messages, add_generation_prompt=add_generation_prompt, date=config.date)
    marked = _render_marked(tokenizer, messages, add_generation_prompt, config, text)
    omitted = _omitted(messages, text, marked)
    if omitted and config.omitted_text == "raise":
        message = messages[omitted[0]]
        raise DataError(
            f"the chat template of {tokenizer.name!r} does not print message {omitted[0]} ({message.role}: "
            f"{message.content[:60]!r}) as it was written; remove what the template removes, use another template, or "
            f"set omitted_text to 'count'"
        )
    plain = special and config.special_text == "plain"
    notes: list[Note] = [*(["special_text"] if special else []), *(["omitted_text"] if omitted else [])]
    return _Rendered(text, _plain_ranges(tokenizer, messages, text, marked) if plain else (), frozenset(notes))


def _control_text(tokenizer: Tokenizer, message: Message) -> str | None:
    """Return the first text of a message that would be read as a control token, or None."""
    for part in (message.content, message.role):
        if tokenizer.has_control_text(part):
            match = tokenizer.control_pattern.search(part)
            return part[:60] if match is None else match[0]
    return None


def _render_marked(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool, config: ChatConfig, text: str
) -> str | None:
    """Return the text with a mark before and after each message, without the white space at the message's ends.

    There is only one mark if the other changes the rest: a template may look at how a message begins, or cut it. None
    if each of them does.
    """
    contents = [message.content.strip() for message in messages]
    if any(map(_MARKS.search, contents)) or not _MARKS.fullmatch(_marks(len(messages))[1]):
        return None
    for before, after in ((1, 1), (0, 1), (1, 0)):
        marked: list[Message] = []
        for at, (message, content) in enumerate(zip(messages, contents, strict=True)):
            start, end = _marks(at)
            with_marks = f"{start * before}{content}{end * after}" if content else ""
            marked.append(Message(message.role, message.content.replace(content, with_marks, 1)))
        try:
            result = tokenizer.template.render(marked, add_generation_prompt=add_generation_prompt, date=config.date)
        except DataError:
            continue
        if _MARKS.sub("", result) == text:
            return result
    return None


def _marks(at: int) -> tuple[str, str]:
    return chr(_FIRST_MARK + 2 * at), chr(_FIRST_MARK + 2 * at + 1)


def _omitted(messages: Sequence[Message], text: str, marked: str | None) -> list[int]:
    """Return the indices of the messages that are not whole in the text, apart from white space at their ends."""
    contents = [message.content.strip() for message in messages]
    if marked is not None:
        # A template that cuts a message at its end removes a mark of a message that is just short enough.
        marks = [_marks(at) for at in range(len(contents))]
        return [
            at
            for at, (content, (start, end)) in enumerate(zip(contents, marks, strict=True))
            if content and start + content not in marked and content + end not in marked
        ]
    omitted: list[int] = []
    position = 0
    for at, content in enumerate(contents):
        start = text.find(content, position)
        if start < 0:
            omitted.append(at)
        else:
            position = start + len(content)
    return omitted


def _plain_ranges(
    tokenizer: Tokenizer, messages: Sequence[Message], text: str, marked: str | None
) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the control tokens that messages contain.

    Raises:
        DataError: A message is not printed whole, so that it is not certain which control tokens are the template's.
    """
    marks = list(_MARKS.finditer(marked or ""))
    starts, ends = marks[::2], marks[1::2]
    is_whole = len(starts) == len(ends) and all(
        ord(start[0]) % 2 == 0 and ord(end[0]) == ord(start[0]) + 1 for start, end in zip(starts, ends, strict=True)
    )
    # A role is part of the template's text, and text that only normalization turns into a token has no range.
    elsewhere = [message.role for message in messages]
    elsewhere += [tokenizer.control_pattern.sub("", message.content) for message in messages]
    if not marks or not is_whole or any(map(tokenizer.has_control_text, elsewhere)):
        raise DataError(
            f"a message contains the text of a special token, and the chat template of {tokenizer.name!r} changes the "
            f"messages that it prints, so the text cannot be kept as plain text; remove it from the message, or set "
            f"special_text to 'parse'"
        )
    ranges: list[tuple[int, int]] = []
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        first, last = start.start() - 2 * index, end.start() - 2 * index - 1
        ranges += [match.span() for match in tokenizer.control_pattern.finditer(text, first, last)]
    return tuple(ranges)


def _cut_after_turn(tokenizer: Tokenizer, answer: list[int]) -> list[int]:
    ends = {*tokenizer.control_ids, _end_of_turn_or_none(tokenizer)}
    end = len(answer)
    while end and answer[end - 1] not in ends and not tokenizer.decode([answer[end - 1]]).strip():
        end -= 1
    return answer[:end] if end and answer[end - 1] in ends else answer


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Return the token that ends a turn in the chat template, or None if it is not one token."""
    _, answer, _ = _split(tokenizer, _PROBE, _PROBE_CONFIG)
    while answer and answer[-1] not in tokenizer.control_ids and not tokenizer.decode([answer[-1]]).strip():
        answer.pop()
    if not answer:
        return None
    is_end = answer[-1] in tokenizer.control_ids or _CONTROL_LIKE.fullmatch(tokenizer.decode([answer[-1]]).strip())
    return answer[-1] if is_end else None


@functools.lru_cache(maxsize=8)
def _end_of_turn_or_none(tokenizer: Tokenizer) -> int | None:
    """Return the end of a turn; None too if the template rejects a bare question, so that it cannot be found out."""
    try:
        return _end_of_turn(tokenizer)
    except DataError:
        return None
