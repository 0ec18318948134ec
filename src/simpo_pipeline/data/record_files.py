"""Rows of JSONL, JSON and Parquet files, decoded but not interpreted.

Lines of JSONL end at a line feed only. A byte order mark at the beginning of a file is skipped.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from simpo_pipeline.data.messages import kind_of
from simpo_pipeline.errors import DataError, SimpoPipelineError
from simpo_pipeline.storage.files import open_read

_PARQUET_ROWS_AT_ONCE = 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"


class Row(NamedTuple):
    """One decoded row. `number` counts from 1: lines of JSONL, rows of other files. `where` names file and row."""

    number: int
    where: str
    value: object


def file_rows(path: str, columns: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of the file at `path`, whose name has a suffix of `ROW_SUFFIXES`; of Parquet only `columns`.

    Raises:
        DataError: The content is not what the suffix says.
        StorageError: The file cannot be read.
    """
    with open_read(path) as file:
        if path.endswith(".parquet"):
            yield from _parquet_rows(file, path, frozenset(columns))
            return
        content = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
        try:
            yield from (_jsonl_rows if path.removesuffix(".gz").endswith(".jsonl") else _json_rows)(content, path)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: not a whole gzip file ({error}); copy it again, or rename it if it is not compressed"
            ) from error


def _jsonl_rows(lines: Iterable[bytes], path: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        text = (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).strip()
        if text:
            where = f"{path}, line {number}"
            yield Row(number, where, _decode(text, where, "one object"))


def _json_rows(file: io.BufferedIOBase, path: str) -> Iterator[Row]:
    value = _decode(file.read().removeprefix(_BYTE_ORDER_MARK), path, "a list of objects")
    if not isinstance(value, list):
        raise DataError(
            f"{path}: the file contains {kind_of(value)}, expected a list; write its rows as one list, or one object "
            f"per line in a file that ends in .jsonl"
        )
    for number, row in enumerate(cast(list[object], value), start=1):
        yield Row(number, f"{path}, row {number}", row)


def _decode(data: bytes, where: str, expected: str) -> object:
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=lambda pairs: _object(pairs, where),
            parse_constant=lambda name: _refuse_constant(name, where),
        )
    except UnicodeDecodeError as error:
        if data.startswith(_GZIP_MAGIC):
            raise DataError(f"{where}: the content is compressed; let the name of a gzip file end in .gz") from error
        raise DataError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
    except json.JSONDecodeError as error:
        hint = "; write one object per line in a file that ends in .jsonl" if error.msg == "Extra data" else ""
        at = f"{error.msg} at line {error.lineno}, column {error.colno}" if error.lineno > 1 else ""
        raise DataError(
            f"{where}: not JSON ({at or f'{error.msg} at column {error.colno}'}), expected {expected}{hint}"
        ) from error
    except RecursionError:
        raise DataError(f"{where}: lists or objects are nested too deeply, expected {expected}") from None
    except DataError:
        raise
    except ValueError as error:  # an integer with more digits than Python converts
        raise DataError(f"{where}: a number is too long ({error}); write it as a string") from error


def _refuse_constant(name: str, where: str) -> object:
    raise DataError(f"{where}: the value {name} is not JSON, which has only finite numbers; write null, or remove it")


def _object(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: an object has the key {twice!r} twice, so one value would be lost; keep one")
    return found


def _parquet_rows(file: Any, path: str, columns: frozenset[str]) -> Iterator[Row]:
    try:
        parquet = pq.ParquetFile(file)
        names = _known_columns(parquet.schema_arrow.names, columns, path)
        number = 0
        for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, columns=names):
            for index, row in enumerate(_batch_rows(batch, path, number)):
                yield Row(number + index + 1, f"{path}, row {number + index + 1}", row)
            number += batch.num_rows
    except SimpoPipelineError:
        raise
    # A damaged file gives any of these, and UnicodeDecodeError, which is a ValueError.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from error


def _known_columns(found: list[str], columns: frozenset[str], path: str) -> list[str]:
    """Return the names of the columns to read.

    Raises:
        DataError: there is none, or the file has one of them twice.
    """
    names = [name for name in found if name in columns]
    if not names:
        listed = ", ".join(map(repr, found)) or "no columns"
        raise DataError(f"{path}: the file has {listed}, none of which is read; name the columns as in docs/data.md")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: the file has the column {name!r} twice, so one would be lost; keep one")
    return names


def _batch_rows(batch: Any, path: str, first: int) -> list[object]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        for index in range(batch.num_rows):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, row {first + index + 1}: a text field is not UTF-8 ({error.reason})"
                ) from error
            except (ValueError, OverflowError) as error:  # a date outside Python's range, or a key that is there twice
                raise DataError(
                    f"{path}, row {first + index + 1}: a value cannot be read ({error}); change its type, or remove it"
                ) from error
        raise
