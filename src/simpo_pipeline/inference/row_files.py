"""Files of generated rows: one per host, and one of all hosts, merged in the order of the prompts.

While a host generates, its rows are in a separate file, in the order in which they finish. If the step is killed, that
file is kept until the step runs again.
"""

import re
from collections.abc import Iterator
from typing import Any

from simpo_pipeline.data.prompts import prompt_shard
from simpo_pipeline.errors import DataError
from simpo_pipeline.storage.files import list_files
from simpo_pipeline.storage.jsonl import read_jsonl
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join

_ROWS_FILE = re.compile(r"(host_\d{4}|all_hosts_merged)_of_\d{4}(\.unfinished)?\.jsonl")


def host_file(process_index: int, process_count: int) -> str:
    """Return the name of the file with the rows of one host."""
    return f"host_{process_index:04d}_of_{process_count:04d}.jsonl"


def unfinished_file(process_index: int, process_count: int) -> str:
    """Return the name of the file with the finished rows of one host, while it is still generating others."""
    return f"host_{process_index:04d}_of_{process_count:04d}.unfinished.jsonl"


def merged_file(process_count: int) -> str:
    """Return the name of the file with the rows of all hosts."""
    return f"all_hosts_merged_of_{process_count:04d}.jsonl"


def remove_rows(output: OutputFolder) -> None:
    """Remove the row files of an earlier attempt with any number of hosts."""
    for entry in list_files(output.path):
        if _ROWS_FILE.fullmatch(entry.relative_path):
            output.remove(entry.relative_path)


def merge_rows(output_path: str, num_prompts: int, num_samples: int, process_count: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of all hosts, ordered by prompt and sample. Each host's file has a contiguous shard in order.

    Args:
        num_samples: Number of samples per prompt.

    Raises:
        DataError: A host's file does not have each row of its shard exactly once.
    """
    for host in range(process_count):
        shard = prompt_shard(num_prompts, host, process_count)
        wanted = [(host, prompt, sample) for prompt in shard for sample in range(num_samples)]
        path = join(output_path, host_file(host, process_count))
        count = 0
        for row in read_jsonl(path):
            found = (row["process_index"], row["global_prompt_index"], row["sample_index"])
            if count >= len(wanted) or found != wanted[count]:
                expected = wanted[count] if count < len(wanted) else "no more"
                raise DataError(f"{path}: row {count} is (process, prompt, sample) {found}, expected {expected}")
            count += 1
            yield row
        if count < len(wanted):
            raise DataError(f"{path}: expected {len(wanted)} sequences but got {count}")
