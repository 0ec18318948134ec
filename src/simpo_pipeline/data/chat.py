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

Note = Literal["special_text", "omitted_text", "trimmed_text", "unencodable_text", "merged_border"]
"""Something about a conversation that is counted, because a policy of `ChatConfig` accepts it. `trimmed_text` needs no
policy: the template removes white space around a message."""

_PROBE = (Message("user", "How many?"), Message("assistant", "Seventeen."))
# The end of a turn depends neither on the date nor on what the template leaves out.
_PROBE_CONFIG = ChatConfig("2000-01-01", "parse", omitted_text="count", unencodable_text="count", merged_border="count")
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
class EncodedPrompt:
    """Tokens that generation starts from."""

    tokens: tuple[int, ...]
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
    return list(encode_prompt(tokenizer, text, config).tokens)


def encode_prompt(
    tokenizer: Tokenizer, prompt: str | Sequence[Message], config: ChatConfig = DEFAULT_CHAT
) -> EncodedPrompt:
    """Return the tokens of a text as `encode_text` does, or of messages as `encode_chat` does before an answer."""
    if isinstance(prompt, str):
        tokens, notes = _encode(tokenizer, _Rendered(prompt, (), frozenset()), config)
        return EncodedPrompt((*tokenizer.first_tokens, *tokens), notes)
    tokens, notes = _encode(tokenizer, _render(tokenizer, prompt, True, config), config)
    return EncodedPrompt(tuple(tokens), notes)


def encode_turn(tokenizer: Tokenizer, messages: Sequence[Message], config: ChatConfig = DEFAULT_CHAT) -> EncodedTurn:
    """Return the tokens of a conversation, split before its last turn.

    White space that the template writes after the end-of-turn token is excluded: generation stops before it.
    If the tokenizer merges text across the border (an answer that begins with a line break), the turn is refused, or
    noted as `merged_border`: then the answer is tokenized separately, because generation starts from the prompt's own
    tokens.

    Raises:
        DataError: the template rejects the messages, renders the prompt differently when the answer follows, or goes on
            after the answer; or the tokens would not be exactly those of the messages.
    """
    _check_turn_is_last(tokenizer)
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
    if tokenizer.chat_template:
        end_of_turn, _ = _end_of_turn(tokenizer)
        ends.update(index for index, text in tokenizer.control_ids.items() if text == end_of_turn)
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
    if config.merged_border == "raise":
        raise DataError(
            f"the tokenizer {tokenizer.name!r} merges the end of the prompt with the beginning of the answer "
            f"{whole.text[len(before.text) :][:40]!r}, but generation starts from the prompt's own tokens; change how "
            f"the answer begins (white space, in general), use another template, or set merged_border to 'count'"
        )
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
    special = _notice_special_text(tokenizer, messages, config)
    text = tokenizer.template.render(messages, add_generation_prompt=add_generation_prompt, date=config.date)
    marked = _render_marked(tokenizer, messages, add_generation_prompt, config, text)
    completed = _notice_completed_token(tokenizer, text, marked, config)
    omitted = _notice_omitted_text(tokenizer, messages, text, marked, config)
    found: dict[Note, bool] = {
        "special_text": special or completed,
        "omitted_text": bool(omitted),
        "trimmed_text": any(message.content not in text for at, message in enumerate(messages) if at not in omitted),
    }
    plain = _plain_ranges(tokenizer, messages, text, marked) if special and config.special_text == "plain" else ()
    return _Rendered(text, plain, frozenset(note for note, is_found in found.items() if is_found))


def _notice_special_text(tokenizer: Tokenizer, messages: Sequence[Message], config: ChatConfig) -> bool:
    """Return whether a message contains the text of a control token, if that is not refused."""
    for at, message in enumerate(messages):
        found = _control_text(tokenizer, message)
        if found is not None and config.special_text == "raise":
            raise DataError(
                f"message {at} ({message.role}) contains {found!r}, which the model would read as a special token of "
                f"{tokenizer.name!r}; remove it, or set special_text to 'parse' or 'plain'"
            )
        if found is not None:
            return True
    return False


def _notice_completed_token(tokenizer: Tokenizer, text: str, marked: str | None, config: ChatConfig) -> bool:
    """Return whether a message and the text around it form a control token, if that is not refused."""
    if marked is None:
        return False
    count, count_apart = (len(tokenizer.control_pattern.findall(each)) for each in (text, marked))
    if count > count_apart and config.special_text != "parse":
        raise DataError(
            f"a message together with the text that the chat template of {tokenizer.name!r} writes around it forms a "
            f"special token; change the beginning or the end of the message, or set special_text to 'parse'"
        )
    return count > count_apart


def _notice_omitted_text(
    tokenizer: Tokenizer, messages: Sequence[Message], text: str, marked: str | None, config: ChatConfig
) -> list[int]:
    """Return the indices of the messages that are not printed whole, if that is not refused."""
    omitted = _omitted(messages, text, marked)
    if omitted and config.omitted_text == "raise":
        message = messages[omitted[0]]
        raise DataError(
            f"the chat template of {tokenizer.name!r} does not print message {omitted[0]} ({message.role}: "
            f"{message.content[:60]!r}) as it was written; remove what the template removes, use another template, or "
            f"set omitted_text to 'count'"
        )
    return omitted


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
    controls = tokenizer.control_ids
    end = len(answer)
    while end and answer[end - 1] not in controls and not tokenizer.decode([answer[end - 1]]).strip():
        end -= 1
    return answer[:end] if end and answer[end - 1] in controls else answer


def _end_of_turn(tokenizer: Tokenizer) -> tuple[str | None, str]:
    """Return the control token that the chat template writes after an answer, or None, and the text that follows it."""
    text = _render(tokenizer, _PROBE, False, _PROBE_CONFIG).text
    start = text.rfind(_PROBE[-1].content)
    match = None if start < 0 else tokenizer.control_pattern.search(text, start)
    return (None, "") if match is None else (match[0], text[match.end() :])


@functools.lru_cache(maxsize=8)
def _check_turn_is_last(tokenizer: Tokenizer) -> None:
    """Check that the template writes only the end of the turn after an answer, and does not open another turn."""
    try:
        _, rest = _end_of_turn(tokenizer)
    except DataError:
        return  # it rejects a bare question, so this cannot be found out
    if tokenizer.control_pattern.sub("", rest).strip():
        raise DataError(
            f"the chat template of {tokenizer.name!r} writes {rest!r:.80} after the end of an answer, as if another "
            f"turn followed; training needs a template that writes it only with add_generation_prompt"
        )
