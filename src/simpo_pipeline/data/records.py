"""Preference records: two conversations that differ in the last assistant turn, read from JSONL, JSON or Parquet.

A record is read from any of the formats of TRL's preference datasets (docs/data.md has a table): conversations whose
last message is the answer, an explicit prompt with answers, or plain text. Plain text becomes one user turn and one
assistant turn, because training applies the chat template to every record; a log line says so. Whatever has no single
meaning is refused. Every error names the file, the row and the field, and says what was found and what is expected.

This module does not know tokens. Whether a record's two answers can be compared is checked when they are tokenized.
"""

import logging
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.data.messages import (
    UNREAD_FIELDS,
    Message,
    check_not_encoded,
    check_text,
    check_unread_fields,
    is_empty,
    kind_of,
    parse_messages,
)
from simpo_pipeline.data.record_files import file_rows
from simpo_pipeline.data.source_files import source_files
from simpo_pipeline.errors import DataError
from simpo_pipeline.storage.paths import base_name

logger = logging.getLogger("simpo_pipeline.data")
# Other names of the prompt in public datasets. Two answers in plain text must not be read without it.
_OTHER_PROMPTS = ("question", "instruction", "input", "query", "context")
_COLUMNS = ("prompt_id", "prompt", "chosen", "rejected", *UNREAD_FIELDS, *_OTHER_PROMPTS)
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt with a better and a worse answer; `where` names the file and row it came from.

    Invariant: `chosen[:-1] == rejected[:-1]`, neither is empty, and both last messages are assistant turns.
    """

    prompt_id: str
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    where: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the answer."""
        return self.chosen[:-1]


def read_records(source: PreferenceSource) -> Iterator[PreferenceRecord]:
    """Yield the records of all files of `source` in order.

    Raises:
        DataError: there is no file, a file is neither JSON nor Parquet, there is no record, or a record is malformed.
        StorageError: a file cannot be read.
    """
    num_records = num_plain = 0
    for path in source_files(source):
        for number, where, row in file_rows(path, _COLUMNS):
            num_records += 1
            num_plain += isinstance(row, Mapping) and isinstance(row.get("chosen"), str)
            yield parse_record(row, default_id=f"{base_name(path)}:{number}", where=where)
    if not num_records:
        raise DataError(f"{source.path}: the dataset is empty; at least one preference pair is needed")
    if num_plain:
        logger.warning(
            "%s: %d of %d records are plain text; each was read as one user turn and one assistant turn, for the chat "
            "template (TRL applies none to plain text)",
            *(source.path, num_plain, num_records),
        )


def parse_record(row: object, *, default_id: str, where: str) -> PreferenceRecord:
    """Return the record of one decoded row, checked against the schema.

    Raises:
        DataError: a field is missing or of the wrong type, the last turn is not the assistant's, the prompts differ, or
            the row can be read in several ways.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: got {kind_of(row)}, expected an object with the fields 'chosen' and 'rejected'")
    fields = cast(Mapping[str, object], row)
    check_unread_fields(fields, where)
    prompt_id = _parse_id(fields.get("prompt_id"), where)
    for side in _SIDES:
        if side not in fields:
            got = ", ".join(repr(name) for name in fields) or "none"
            raise DataError(f"{where}: field {side!r} is missing (fields: {got}); expected a list of messages or text")
    if isinstance(fields["chosen"], str) and isinstance(fields["rejected"], str):
        chosen, rejected = _plain_text_sides(fields, where)
    else:
        chosen, rejected = _conversations(fields, where)
    return PreferenceRecord(prompt_id or default_id, chosen, rejected, where)


def _parse_id(value: object, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: field 'prompt_id' is {kind_of(value)}, expected a string or an integer")
    return check_text(value or "", "prompt_id", where)


def _conversations(fields: Mapping[str, object], where: str) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the two conversations of a row whose `chosen` and `rejected` are lists of messages."""
    chosen, rejected = (parse_messages(fields[side], side, where) for side in _SIDES)
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        # It repeats a question of the conversation in many datasets, and TRL ignores it too.
        check_not_encoded(prompt, "prompt", where)
    elif not is_empty(prompt):
        chosen, rejected = _with_prompt(parse_messages(prompt, "prompt", where), chosen, rejected, where)
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        _check_conversation(messages, side, where)
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            f"{where}: field 'rejected' has a different prompt than 'chosen' {_first_difference(chosen, rejected)}; "
            f"both must have the same turns before the last one"
        )
    return chosen, rejected


def _with_prompt(
    prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...], where: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the conversations of answers to an explicit prompt, which is not added to those that contain it."""
    sides = (chosen, rejected)
    if all(len(side) > len(prompt) and side[: len(prompt)] == prompt for side in sides):
        return sides
    for name, side in zip(_SIDES, sides, strict=True):
        if len(side) != 1:
            raise DataError(
                f"{where}: field {name!r} has {len(side)} messages, which neither are one answer to the messages in "
                f"'prompt' nor begin with them; move all messages before the answer into 'prompt', or remove 'prompt'"
            )
    return (*prompt, *chosen), (*prompt, *rejected)


def _check_conversation(messages: tuple[Message, ...], side: str, where: str) -> None:
    if len(messages) < 2:
        raise DataError(
            f"{where}: field {side!r} has {len(messages)} messages, expected a prompt and an answer; write the "
            f"messages before the answer at its beginning, or into the field 'prompt', as a list of messages"
        )
    if messages[-1].role != "assistant":
        raise DataError(
            f"{where}: field {side!r} does not end with an assistant turn; the last message has role "
            f"{messages[-1].role!r}, expected 'assistant'"
        )
    if messages[-2].role == "assistant":
        raise DataError(
            f"{where}: field {side!r} has an assistant turn before the answer, which may be a turn of its own, or the "
            f"beginning of the answer, as in TRL; join the two turns, or write a user's turn between them"
        )


def _plain_text_sides(
    fields: Mapping[str, object], where: str
) -> tuple[tuple[Message, Message], tuple[Message, Message]]:
    """Return a user turn and an assistant turn for each side of a row whose fields are plain text."""
    chosen, rejected = (check_text(cast(str, fields[side]), side, where) for side in _SIDES)
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        check_not_encoded(text, side, where)
    prompt = fields.get("prompt")
    if prompt is None:
        _check_no_other_prompt(fields, where)
        prompt, chosen, rejected = _split_shared_prompt(chosen, rejected, where)
    elif not isinstance(prompt, str):
        raise DataError(
            f"{where}: field 'prompt' is {kind_of(prompt)}, but 'chosen' and 'rejected' are strings; write each answer "
            f"as [{{'role': 'assistant', 'content': '...'}}]"
        )
    elif not check_text(prompt, "prompt", where).strip():
        raise DataError(f"{where}: field 'prompt' is empty, expected the text that both answers answer")
    elif chosen.startswith(prompt) and rejected.startswith(prompt):
        raise DataError(
            f"{where}: fields 'chosen' and 'rejected' both begin with the text of 'prompt', so they may be answers or "
            f"repeat the prompt; remove the prompt from them, or, if they are answers, write all three as lists of "
            f"messages"
        )
    else:
        check_not_encoded(prompt, "prompt", where)
    user = Message("user", prompt)
    return (user, Message("assistant", chosen)), (user, Message("assistant", rejected))


def _check_no_other_prompt(fields: Mapping[str, object], where: str) -> None:
    for name in _OTHER_PROMPTS:
        if not is_empty(fields.get(name)):
            raise DataError(
                f"{where}: field 'prompt' is missing, and field {name!r} may be the prompt; rename it to 'prompt', or "
                f"remove it if 'chosen' and 'rejected' begin with the prompt"
            )


def _split_shared_prompt(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Return the prompt that both texts begin with, and the two answers after it.

    The prompt ends where TRL's `extract_prompt` ends it: before the first character that differs, or before the blank
    in front of that character.
    """
    advice = "add the field 'prompt', and leave the prompt out of 'chosen' and 'rejected'"
    pairs = enumerate(zip(chosen, rejected, strict=False))
    end = next((index for index, (left, right) in pairs if left != right), None)
    if end is None:
        raise DataError(
            f"{where}: 'chosen' and 'rejected' are equal, or one continues the other, so one answer would be empty; "
            f"{advice}"
        )
    for text in (chosen, rejected):
        if end and _is_inside_word(text[end - 1], text[end]):
            raise DataError(
                f"{where}: 'chosen' and 'rejected' first differ inside a word, at character {end} "
                f"({chosen[max(0, end - 12) : end + 8]!r}), so their answers begin earlier than that; {advice}"
            )
    if end and chosen[end - 1] == " ":
        end -= 1
    if not chosen[:end].strip():
        raise DataError(f"{where}: 'chosen' and 'rejected' do not begin with the same prompt; {advice}")
    return chosen[:end], chosen[end:], rejected[end:]


def _is_inside_word(left: str, right: str) -> bool:
    """Return whether no word can end between two characters, in scripts that separate words by blanks."""
    return unicodedata.category(right).startswith("M") or all(
        character.isdecimal() or character.lower() != character.upper() for character in (left, right)
    )


def _first_difference(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> str:
    for index, (left, right) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)):
        if left != right:
            return f"(message {index}: {_excerpt(left)} against {_excerpt(right)})"
    return f"({len(chosen)} messages against {len(rejected)})"


def _excerpt(message: Message) -> str:
    text = message.content if len(message.content) <= 40 else message.content[:40] + "..."
    return f"{message.role}: {text!r}"
