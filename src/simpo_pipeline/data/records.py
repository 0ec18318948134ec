"""Preference records: two conversations that differ in the last assistant turn, read from JSONL, Parquet or the hub.

The schema is that of UltraFeedback-binarized: `chosen` and `rejected` are lists of `{role, content}` messages, and
`prompt_id` is optional. Other columns are ignored. Every error names the file, the row and the field, and says what was
found and what is expected. This module does not know tokens. Whether a record's two answers can be compared is checked
when they are tokenized.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.data.source_files import source_files
from simpo_pipeline.errors import DataError
from simpo_pipeline.storage.files import open_read
from simpo_pipeline.storage.paths import base_name

_COLUMNS = ("prompt_id", "chosen", "rejected")
_PARQUET_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


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
        DataError: there is no file, a file is neither JSONL nor Parquet, there is no record, or a record is malformed.
        StorageError: a file cannot be read.
    """
    num_records = 0
    for path in source_files(source):
        with open_read(path) as file:
            rows = _parquet_rows(file, path) if path.endswith(".parquet") else _jsonl_rows(file, path)
            for number, where, row in rows:
                num_records += 1
                yield parse_record(row, default_id=f"{base_name(path)}:{number}", where=where)
    if not num_records:
        raise DataError(f"{source.path}: the dataset is empty; at least one preference pair is needed")


def parse_record(row: object, *, default_id: str, where: str) -> PreferenceRecord:
    """Return the record of one decoded row, checked against the schema.

    Raises:
        DataError: a field is missing or of the wrong type, the last turn is not the assistant's, or the prompts differ.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: got {_kind(row)}, expected an object with the fields 'chosen' and 'rejected'")
    fields = cast(Mapping[str, object], row)
    prompt_id = fields.get("prompt_id")
    if prompt_id is not None and not isinstance(prompt_id, str):
        raise DataError(f"{where}: field 'prompt_id' is {_kind(prompt_id)}, expected a string")
    _check_text(prompt_id or "", "prompt_id", where)
    chosen, rejected = (_parse_messages(fields, field, where) for field in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            f"{where}: field 'rejected' has a different prompt than 'chosen' {_first_difference(chosen, rejected)}; "
            f"both must have the same turns before the last one"
        )
    return PreferenceRecord(prompt_id or default_id, chosen, rejected, where)


def _parse_messages(fields: Mapping[str, object], field: str, where: str) -> tuple[Message, ...]:
    if field not in fields:
        got = ", ".join(repr(name) for name in fields) or "none"
        raise DataError(f"{where}: field {field!r} is missing (fields: {got}); expected a list of messages")
    value = fields[field]
    if not isinstance(value, list):
        raise DataError(f"{where}: field {field!r} is {_kind(value)}, expected a list of {{role, content}} messages")
    turns = cast(list[object], value)
    messages = tuple(_parse_message(turn, f"{field}[{index}]", where) for index, turn in enumerate(turns))
    if len(messages) < 2:
        raise DataError(f"{where}: field {field!r} has {len(messages)} messages, expected a prompt and an answer")
    if messages[-1].role != "assistant":
        raise DataError(
            f"{where}: field {field!r} does not end with an assistant turn; the last message has role "
            f"{messages[-1].role!r}, expected 'assistant'"
        )
    return messages


def _parse_message(value: object, field: str, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: field {field!r} is {_kind(value)}, expected an object with 'role' and 'content'")
    parts = cast(Mapping[str, object], value)
    for part in ("role", "content"):
        if part not in parts:
            raise DataError(f"{where}: field '{field}.{part}' is missing, expected a string")
        if not isinstance(parts[part], str):
            raise DataError(f"{where}: field '{field}.{part}' is {_kind(parts[part])}, expected a string")
        _check_text(cast(str, parts[part]), f"{field}.{part}", where)
    return Message(role=cast(str, parts["role"]), content=cast(str, parts["content"]))


def _check_text(text: str, field: str, where: str) -> None:
    try:
        text.encode("utf-8")  # JSON can contain half of a surrogate pair, which no tokenizer accepts
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field '{field}' is not valid Unicode at character {error.start}") from error


def _first_difference(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> str:
    for index, (left, right) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)):
        if left != right:
            return f"(message {index}: {_excerpt(left)} against {_excerpt(right)})"
    return f"({len(chosen)} messages against {len(rejected)})"


def _excerpt(message: Message) -> str:
    text = message.content if len(message.content) <= 40 else message.content[:40] + "..."
    return f"{message.role}: {text!r}"


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _jsonl_rows(lines: Iterable[bytes], path: str) -> Iterator[tuple[int, str, object]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}), expected one object") from error
        yield number, where, row


def _parquet_rows(file: Any, path: str) -> Iterator[tuple[int, str, object]]:
    try:
        parquet = pq.ParquetFile(file)
        columns = [name for name in parquet.schema_arrow.names if name in _COLUMNS]
        batches = parquet.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, columns=columns)
        number = 0
        for batch in batches:
            for index, row in enumerate(_batch_rows(batch, path, number)):
                yield number + index + 1, f"{path}, row {number + index + 1}", row
            number += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def _batch_rows(batch: Any, path: str, first: int) -> list[object]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, row {first + index + 1}: a text field is not UTF-8 ({error.reason})"
                ) from error
        raise
