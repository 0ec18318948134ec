"""Tokenised preference pairs: the value the loader serves, and its Parquet file.

Knows token ids and where an answer begins. Does not know text, tokenizers or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int32

from simpo_pipeline.errors import DataError
from simpo_pipeline.storage.files import open_read, open_write


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """One prompt with its chosen and its rejected answer, as the model reads them: prompt then answer.

    `*_response_start` is the index of the answer's first token; from there to the end all tokens are the answer's,
    its end-of-turn token included.

    Raises:
        DataError: the prompt or an answer has no tokens.
    """

    prompt_id: str
    chosen_tokens: Int32[np.ndarray, " chosen"]
    rejected_tokens: Int32[np.ndarray, " rejected"]
    chosen_response_start: int
    rejected_response_start: int

    def __post_init__(self) -> None:
        for side, tokens, start in (
            ("chosen", self.chosen_tokens, self.chosen_response_start),
            ("rejected", self.rejected_tokens, self.rejected_response_start),
        ):
            if not 0 < start < len(tokens):
                raise DataError(
                    f"pair {self.prompt_id!r}: the {side} answer starts at token {start} of {len(tokens)}; "
                    f"both the prompt and the answer need at least one token"
                )

    @property
    def num_tokens(self) -> int:
        """Tokens of both sequences, without padding."""
        return len(self.chosen_tokens) + len(self.rejected_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return max(len(self.chosen_tokens), len(self.rejected_tokens))


def check_lengths(pairs: Sequence[TokenizedPair], seq_len: int) -> None:
    """Checks that every sequence has at most `seq_len` tokens.

    Raises:
        DataError: one has more; the first such pair is named.
    """
    for pair in pairs:
        if pair.longest > seq_len:
            raise DataError(
                f"pair {pair.prompt_id!r} has {pair.longest} tokens, more than seq_len {seq_len}; "
                f"raise the sequence length or prepare the pairs with a shorter max_length"
            )


def check_vocabulary(pairs: Sequence[TokenizedPair], pad_id: int, vocab_size: int) -> None:
    """Checks that a model of this many tokens knows all those of the pairs, and the one that fills what is left.

    Raises:
        DataError: it does not.
    """
    if pad_id >= vocab_size:
        raise DataError(
            f"the padding token is {pad_id}, and the model knows tokens 0 to {vocab_size - 1}; use the model's own "
            "tokenizer"
        )
    for pair in pairs:
        largest = max(int(pair.chosen_tokens.max()), int(pair.rejected_tokens.max()))
        if largest >= vocab_size:
            raise DataError(
                f"pair {pair.prompt_id!r} holds token {largest}, and the model knows tokens 0 to {vocab_size - 1}; "
                "prepare the pairs with the model's own tokenizer"
            )


def write_pairs(path: str, pairs: Sequence[TokenizedPair]) -> None:
    """Write the pairs as one Parquet file: prompt_id, two lists of int32 tokens and where each answer starts.

    Raises:
        StorageError: the file cannot be written.
    """
    import pyarrow as pa  # here, because importing it takes longer than planning a whole job
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "prompt_id": pa.array([pair.prompt_id for pair in pairs], pa.string()),
            "chosen_tokens": pa.array([pair.chosen_tokens for pair in pairs], pa.list_(pa.int32())),
            "rejected_tokens": pa.array([pair.rejected_tokens for pair in pairs], pa.list_(pa.int32())),
            "chosen_response_start": pa.array([pair.chosen_response_start for pair in pairs], pa.int32()),
            "rejected_response_start": pa.array([pair.rejected_response_start for pair in pairs], pa.int32()),
        }
    )
    with open_write(path) as file:
        pq.write_table(table, file)


def read_pairs(path: str) -> list[TokenizedPair]:
    """Read what write_pairs wrote, in its order.

    Raises:
        DataError: the file is not Parquet or lacks a column.
        StorageError: the file cannot be read.
    """
    import pyarrow as pa  # here, as above
    import pyarrow.parquet as pq

    names = [field.name for field in fields(TokenizedPair)]
    with open_read(path) as file:
        try:
            table = pq.read_table(file)
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path}: the columns {', '.join(missing)} are missing (it has {', '.join(table.column_names)}); expected "
            f"tokenised pairs; prepare preference data first"
        )
    columns = [_token_rows(table[name]) if name.endswith("_tokens") else table[name].to_pylist() for name in names]
    return [TokenizedPair(*row) for row in zip(*columns, strict=True)]


def _token_rows(column: Any) -> list[Int32[np.ndarray, " _"]]:
    """Cut one list column into rows that share its memory, so that a large set costs no copy a row."""
    rows = column.combine_chunks()
    tokens = rows.values.to_numpy()
    offsets = rows.offsets.to_numpy()
    return [tokens[start:end] for start, end in pairwise(offsets)]
