"""Generated samples as rows of JSON lines, on disk as soon as each has ended.

On a local disk each row is handed to the operating system when it is written: a process that is killed loses none.
An object store cannot append, so there the whole file is uploaded every `_UPLOAD_SECONDS`, or less often where an
upload takes long: a process that is killed loses what ended since.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from simpo_pipeline.errors import DataError
from simpo_pipeline.inference.sequence import Completion
from simpo_pipeline.inference.text import Decode, text_of
from simpo_pipeline.storage.files import open_read
from simpo_pipeline.storage.jsonl import JsonlWriter
from simpo_pipeline.storage.paths import is_local

# A bucket takes one change of an object a second.
_UPLOAD_SECONDS = 2.0
# So that uploads, which keep the engine's next round waiting, take a twentieth of the time at most.
_SECONDS_PER_UPLOAD_SECOND = 20.0


def generated_row(completion: Completion, prompt: str | None, decode: Decode) -> dict[str, Any]:
    """One sample as a row; `prompt` is its text, None where there is none.

    With `logprobs` asked for, the row has the drawn tokens' and their sum, and pairs [token id, log-probability] of the
    likeliest tokens in place of each if any of those were asked for.
    """
    request, tokens = completion.request, completion.tokens
    row = {
        "global_prompt_index": request.global_prompt_index,
        "sample_index": request.sample_index,
        "prompt": prompt,
        "prompt_token_count": len(request.prompt_tokens),
        "generated_text": text_of(completion, decode),
        "generated_tokens": list(tokens),
        "generated_token_count": len(tokens),
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        row["logprobs"] = [each.chosen for each in completion.logprobs]
        row["cumulative_logprob"] = sum(row["logprobs"])
        if request.sampling.logprobs:
            row["top_logprobs"] = [[list(pair) for pair in each.top] for each in completion.logprobs]
    return row


class RowStream:
    """A new file of rows, over any earlier one, that others may read with `read_finished_rows` while it grows."""

    def __init__(self, path: str, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._writer = JsonlWriter(path)
        self._appends = is_local(path)
        self._next_upload = now()
        self._upload_if_due()  # rows of an earlier file must not pass for this one's

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows.

        Raises:
            StorageError: they could not be written.
        """
        for row in rows:
            self._writer.write(row)
        self._upload_if_due()

    def __enter__(self) -> "RowStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def _upload_if_due(self) -> None:
        started = self._now()
        if self._appends or started < self._next_upload:
            return
        self._writer.flush()
        ended = self._now()
        self._next_upload = ended + max(_UPLOAD_SECONDS, _SECONDS_PER_UPLOAD_SECOND * (ended - started))


def read_finished_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows in a `RowStream`'s file, in the order in which they ended.

    A last line without its end is left out: its writer was killed at it, or is writing it now.

    Raises:
        PathNotFoundError: there is no such file.
        DataError: a line is no JSON object.
    """
    with open_read(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}); only a last line may be cut") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: got a {type(row).__name__}; each line is one JSON object")
            yield row
