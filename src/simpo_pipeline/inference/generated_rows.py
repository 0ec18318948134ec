"""Generated samples as JSON Lines rows, written as soon as each sample finishes.

On a local disk, each row is flushed to the operating system when it is written, so a killed process loses no rows. An
object store cannot append, so the whole file is uploaded every `_UPLOAD_SECONDS`, or less often if uploads are slow. A
killed process loses the rows since the last upload.
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

# Object stores accept one update of an object per second.
_UPLOAD_SECONDS = 2.0
# Minimum interval per second of upload. Uploads delay the engine's next round; this limits them to 1/20 of the time.
_SECONDS_PER_UPLOAD_SECOND = 20.0


def generated_row(completion: Completion, prompt: str | None, decode: Decode) -> dict[str, Any]:
    """Return one sample as a row; `prompt` is the prompt's text, or None if it has no text.

    If log-probabilities were requested, the row has those of the generated tokens and their sum. If most likely tokens
    were requested too, the row has a list of pairs [token id, log-probability] for each generated token.
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
    """Writer of rows that owns `writer`; `read_finished_rows` can read the file while it grows."""

    def __init__(self, writer: JsonlWriter, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._writer = writer
        self._appends = is_local(writer.path)
        self._next_upload = now()
        self._upload_if_due()  # rows of an earlier file must not be taken for this file's

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows.

        Raises:
            StorageError: The rows could not be written.
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
        finished = self._now()
        self._next_upload = finished + max(_UPLOAD_SECONDS, _SECONDS_PER_UPLOAD_SECOND * (finished - started))


def read_finished_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `RowStream` file, in the order in which their samples finished.

    A last line without a newline is skipped: its writer was killed while writing it, or is still writing it.

    Raises:
        PathNotFoundError: The file does not exist.
        DataError: A line is not a JSON object.
    """
    with open_read(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}); only the last line may be cut") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: got a {type(row).__name__}; each line must be a JSON object")
            yield row
