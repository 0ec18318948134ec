"""Rows of one host in step `infer`: written as they finish, and in the order of the prompts at the end."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from simpo_pipeline.inference.generated_rows import RowStream
from simpo_pipeline.inference.row_files import host_file, unfinished_file
from simpo_pipeline.processes import Processes
from simpo_pipeline.storage.output_folder import OutputFolder

if TYPE_CHECKING:
    from simpo_pipeline.inference.sequence import Completion


class HostRows:
    """Writer of the rows of a host's shard. It ignores completions of prompts outside the shard."""

    def __init__(
        self,
        output: OutputFolder,
        processes: Processes,
        shard: range,
        make_row: "Callable[[Completion], dict[str, Any]]",
    ) -> None:
        host = (processes.process_index, processes.process_count)
        self._output = output
        self._name = host_file(*host)
        self._unfinished_name = unfinished_file(*host)
        self._shard = shard
        self._make_row = make_row
        self._rows: list[dict[str, Any]] = []
        self._stream: RowStream | None = None

    def __enter__(self) -> "HostRows":
        self._stream = RowStream(self._output.open_rows(self._unfinished_name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.__exit__(kind, error, trace)

    def add(self, finished: "Sequence[Completion]") -> None:
        """Write the rows of finished samples to the unfinished file."""
        assert self._stream is not None, "inside the block only"
        rows = [self._make_row(each) for each in finished if each.request.global_prompt_index in self._shard]
        self._stream.write(rows)
        self._rows += rows

    def write_in_order(self) -> None:
        """Write this host's file in the order of the prompts, and remove the unfinished file."""
        with self._output.open_rows(self._name) as file:
            for row in sorted(self._rows, key=lambda row: (row["global_prompt_index"], row["sample_index"])):
                file.write(row)
        self._output.remove(self._unfinished_name)
