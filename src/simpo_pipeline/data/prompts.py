"""Prompts to generate from, and the shard of them that one host serves.

A prompt is text, a conversation or token ids. This module does not know tokenizers, models or processes.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import cast

from simpo_pipeline.data.messages import (
    UNREAD_FIELDS,
    Message,
    check_not_encoded,
    check_text,
    check_unread_fields,
    kind_of,
    parse_messages,
)
from simpo_pipeline.data.source_files import ROW_SUFFIXES
from simpo_pipeline.errors import ConfigError, DataError
from simpo_pipeline.executor.step import outside_path
from simpo_pipeline.storage.files import exists, read_text

DEFAULT_TEMPLATE = "Synthetic prompt {index}: explain one key concept in machine learning."
_PROMPT_FIELDS = ("prompt", "messages", "prompt_token_ids")
_BYTE_ORDER_MARK = "\ufeff"


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A conversation to answer, which the chat template renders."""

    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class TokenPrompt:
    """Token ids to continue, exactly as they are."""

    token_ids: tuple[int, ...]


Prompt = str | ChatPrompt | TokenPrompt


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """The source of prompts; exactly one of the three sources must be set.

    Attributes:
        prompts: The prompts themselves.
        prompts_path: A UTF-8 file at any storage path. A text file has one prompt per line. A file whose name ends in
            one of `ROW_SUFFIXES` has one prompt per row (docs/data.md).
        synthetic_prompt_count: Number of prompts to generate from `synthetic_prompt_template`.
        synthetic_prompt_template: A format string with the field `{index}`, which counts from 0.
    """

    prompts: tuple[str, ...] = ()
    prompts_path: str | None = dataclasses.field(default=None, metadata=outside_path())
    synthetic_prompt_count: int | None = None
    synthetic_prompt_template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        given = [bool(self.prompts), self.prompts_path is not None, self.synthetic_prompt_count is not None]
        if sum(given) != 1:
            raise ConfigError(
                f"exactly one of prompts, prompts_path and synthetic_prompt_count must be set, got {sum(given)} of them"
            )
        if self.synthetic_prompt_count is not None and self.synthetic_prompt_count < 1:
            raise ConfigError(f"synthetic_prompt_count must be positive, got {self.synthetic_prompt_count}")
        for index, prompt in enumerate(self.prompts):
            if not check_text(prompt, f"prompts[{index}]", "settings").strip():
                raise ConfigError(f"prompts[{index}] is empty; give every prompt some text or leave it out")
        if not check_text(self._expand_template(0), "synthetic_prompt_template", "settings").strip():
            raise ConfigError("synthetic_prompt_template is empty; give every prompt some text")

    @property
    def count(self) -> int | None:
        """Number of prompts; None if it depends on the file at `prompts_path`."""
        return self.synthetic_prompt_count if not self.prompts else len(self.prompts)

    def _expand_template(self, index: int) -> str:
        try:
            return self.synthetic_prompt_template.format(index=index)
        except (AttributeError, KeyError, IndexError, MemoryError, TypeError, ValueError) as error:
            raise ConfigError(
                f"synthetic_prompt_template {self.synthetic_prompt_template!r} cannot be filled ({error!r}); "
                "its only field is {index}, and literal braces must be doubled"
            ) from error


def load_prompts(config: PromptsConfig) -> tuple[Prompt, ...]:
    """Return all prompts of the job, in global order.

    Raises:
        DataError: `prompts_path` does not exist, contains no prompt, or has a row that is not a prompt.
    """
    if config.prompts:
        return config.prompts
    if config.synthetic_prompt_count is not None:
        return tuple(config._expand_template(index) for index in range(config.synthetic_prompt_count))
    path = config.prompts_path
    assert path is not None
    if not exists(path):
        raise DataError(f"prompts_path does not exist: {path}")
    prompts = tuple(_row_prompts(path) if path.endswith(ROW_SUFFIXES) else _line_prompts(path))
    if not prompts:
        raise DataError(f"prompts_path contains no non-empty prompts: {path}; write one prompt a line")
    return prompts


def _line_prompts(path: str) -> list[str]:
    """Return the lines of a text file, except those that are blank.

    A line ends at a line feed, or a carriage return and a line feed. Everything else in it belongs to the prompt.
    """
    text = read_text(path).removeprefix(_BYTE_ORDER_MARK)
    lines = text.replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, start=1):
        _check_not_a_row(line, f"{path}, line {number}")
    return [line for line in lines if line.strip()]


def _check_not_a_row(line: str, where: str) -> None:
    """Check that a line of a text file is not a prompt of a file of rows, whose JSON would be read as its text."""
    if not line.lstrip().startswith("{"):
        return
    try:
        row: object = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(row, dict) and not row.keys().isdisjoint(_PROMPT_FIELDS):
        raise DataError(
            f"{where}: the line is a JSON object with a prompt; let the file's name end in .jsonl, or, if the JSON is "
            f"the text of the prompt, write it as the field 'prompt' of a row there"
        )


def _row_prompts(path: str) -> Iterator[Prompt]:
    from simpo_pipeline.data.record_files import file_rows  # imports pyarrow, which planning does not need

    for row in file_rows(path, (*_PROMPT_FIELDS, *UNREAD_FIELDS)):
        yield parse_prompt(row.value, row.where)


def parse_prompt(row: object, where: str) -> Prompt:
    """Return the prompt of one decoded row.

    Raises:
        DataError: it is not an object with exactly one of the fields `prompt`, `messages` and `prompt_token_ids`, or
            the value is not a prompt.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: got {kind_of(row)}, expected an object like {{'prompt': '...'}}")
    fields = cast(Mapping[str, object], row)
    check_unread_fields(fields, where)
    given = [name for name in _PROMPT_FIELDS if fields.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(map(repr, given)) or "none of them"
        raise DataError(
            f"{where}: expected exactly one of the fields {', '.join(map(repr, _PROMPT_FIELDS))}, got {found}; keep "
            f"the one to generate from"
        )
    (name,), value = given, fields[given[0]]
    if name == "prompt_token_ids":
        return TokenPrompt(_parse_token_ids(value, where))
    if name == "prompt" and isinstance(value, str):
        if not check_text(value, name, where).strip():
            raise DataError(f"{where}: field 'prompt' is empty; give every prompt some text, or remove the row")
        check_not_encoded(value, name, where)
        return value
    messages = parse_messages(value, name, where)
    if not messages or messages[-1].role == "assistant":
        last = "has no messages" if not messages else "ends with an assistant turn"
        raise DataError(f"{where}: field {name!r} {last}; end it with the turn to answer, such as a user's")
    return ChatPrompt(messages)


def _parse_token_ids(value: object, where: str) -> tuple[int, ...]:
    ids = cast(list[object], value) if isinstance(value, list) else []
    # bool is a subclass of int.
    wrong = [each for each in ids if not isinstance(each, int) or isinstance(each, bool) or each < 0]
    if not ids or wrong:
        found = f"{wrong[0]!r:.40}" if wrong else "empty" if isinstance(value, list) else kind_of(value)
        raise DataError(
            f"{where}: field 'prompt_token_ids' {'contains' if wrong else 'is'} {found}, expected a list of token ids, "
            f"which are integers from 0"
        )
    return tuple(cast(list[int], ids))


def num_bytes(prompt: Prompt) -> int:
    """Return the size of a prompt's content in UTF-8, or the number of its token ids."""
    if isinstance(prompt, TokenPrompt):
        return len(prompt.token_ids)
    texts = [message.content for message in prompt.messages] if isinstance(prompt, ChatPrompt) else [prompt]
    return sum(len(text.encode()) for text in texts)


def prompt_shard(num_prompts: int, process_index: int, process_count: int) -> range:
    """Return the contiguous indices `[i*n//p, (i+1)*n//p)` that process i of p serves.

    Shards may differ in size or be empty.

    Raises:
        ConfigError: `process_count` is below 1, or `process_index` is not in [0, process_count).
    """
    if process_count < 1:
        raise ConfigError(f"process_count must be positive, got {process_count}")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index={process_index} out of range for process_count={process_count}")
    start = process_index * num_prompts // process_count
    stop = (process_index + 1) * num_prompts // process_count
    return range(start, stop)
