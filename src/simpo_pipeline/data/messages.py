"""Messages of conversations, decoded from JSON or Parquet and checked.

Everything in a message that changes what a model reads is taken or refused; nothing is left out. This module does not
know tokens or templates: a role that a chat template does not know is refused when the conversation is rendered.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from simpo_pipeline.errors import DataError

# Fields of a row that other trainers add to the conversation. They must be empty here.
UNREAD_FIELDS = (
    *("system", "system_prompt", "tools", "functions", "documents", "history"),
    *("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
    *("image", "images", "audio", "audios", "video", "videos", "multi_modal_data"),
)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


def parse_messages(value: object, field: str, where: str) -> tuple[Message, ...]:
    """Return the messages in `value`.

    Args:
        value: A list of `{role, content}` objects; content is text or a list of text parts.
        field: The field of the row that contains the list.
        where: The file and the row; every message about them begins with it.

    Raises:
        DataError: the value is not such a list, or a message has a key whose meaning would be lost.
    """
    if not isinstance(value, list):
        raise DataError(f"{where}: field {field!r} is {kind_of(value)}, expected a list of {{role, content}} messages")
    turns = cast(list[object], value)
    return tuple(_parse_message(turn, f"{field}[{index}]", where) for index, turn in enumerate(turns))


def check_unread_fields(fields: Mapping[str, object], where: str) -> None:
    """Check that a row has no field that other trainers add to the conversation.

    Raises:
        DataError: it has such a field, and the field is not empty.
    """
    for name in UNREAD_FIELDS:
        if not is_empty(fields.get(name)):
            raise DataError(
                f"{where}: field {name!r} is {kind_of(fields[name])}, and would be part of what a model reads, but "
                f"only messages of text are read; write it into the messages (a system text as the first message, with "
                f"role 'system'), or remove the field"
            )


def check_text(text: str, field: str, where: str) -> str:
    """Return `text` if it is valid Unicode.

    Raises:
        DataError: it contains half of a surrogate pair, which JSON allows and no tokenizer accepts.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field '{field}' is not valid Unicode at character {error.start}; write the character whole"
        ) from error
    return text


def check_not_encoded(text: str, field: str, where: str) -> None:
    """Check that a text is not a list of messages that was written as a string.

    Raises:
        DataError: it is one.
    """
    if not text.lstrip().startswith("["):
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        raise DataError(
            f"{where}: field '{field}' is a string that contains a list of messages as JSON; write the list itself, "
            f"without the quotes around it"
        )


def is_empty(value: object) -> bool:
    """Return whether a value that is not read can be left out without a loss."""
    return value is None or (isinstance(value, str | list | dict | tuple) and not value)


def kind_of(value: object) -> str:
    """Return the JSON name of a value's type, with its article."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _parse_message(value: object, field: str, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: field {field!r} is {kind_of(value)}, expected an object with 'role' and 'content'")
    parts = cast(Mapping[str, Any], value)
    _check_no_more(parts, ("role", "content"), field, where)
    for part in ("role", "content"):
        if part not in parts:
            keys = " and ".join(map(repr, parts)) or "nothing"
            raise DataError(f"{where}: field '{field}.{part}' is missing, expected a string; the message has {keys}")
    if not isinstance(parts["role"], str):
        raise DataError(f"{where}: field '{field}.role' is {kind_of(parts['role'])}, expected a string")
    role = check_text(parts["role"], f"{field}.role", where)
    return Message(role, _parse_content(parts["content"], f"{field}.content", where))


def _parse_content(value: object, field: str, where: str) -> str:
    if isinstance(value, str):
        return check_text(value, field, where)
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: field '{field}' is {kind_of(value) if not isinstance(value, list) else 'an empty list'}, "
            f"expected a string or a list of parts like {{'type': 'text', 'text': '...'}}"
        )
    return "".join(_parse_part(part, f"{field}[{index}]", where) for index, part in enumerate(value))


def _parse_part(value: object, field: str, where: str) -> str:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: field '{field}' is {kind_of(value)}, expected {{'type': 'text', 'text': '...'}}")
    part = cast(Mapping[str, Any], value)
    if part.get("type") != "text":
        raise DataError(
            f"{where}: field '{field}.type' is {part.get('type')!r:.40}, expected 'text'; only text is read, so "
            f"describe the part in words or remove the row"
        )
    _check_no_more(part, ("type", "text"), field, where)
    if not isinstance(part.get("text"), str):
        raise DataError(f"{where}: field '{field}.text' is {kind_of(part.get('text'))}, expected a string")
    return check_text(part["text"], f"{field}.text", where)


def _check_no_more(parts: Mapping[str, Any], known: tuple[str, ...], field: str, where: str) -> None:
    for key, value in parts.items():
        if key not in known and not is_empty(value):
            raise DataError(
                f"{where}: field {f'{field}.{key}'!r} is {kind_of(value)}, which is not read, but may change what a "
                f"model reads; only {' and '.join(map(repr, known))} are allowed, so write what it says into the text, "
                f"or remove the key"
            )
