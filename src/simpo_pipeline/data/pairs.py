"""Tokenized preference pairs, which the loader serves, and their Parquet file.

This module knows token ids and where an answer begins. It does not know text, tokenizers or models.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32

from simpo_pipeline.errors import DataError
from simpo_pipeline.storage.files import open_read


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """One prompt with its chosen and its rejected answer, each as the model reads it: prompt, then answer.

    `*_response_start` is the index of the answer's first token. All tokens from there to the end belong to the answer,
    including its end-of-turn token.

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
        """Number of tokens in both sequences, without padding."""
        return len(self.chosen_tokens) + len(self.rejected_tokens)

    @property
    def longest(self) -> int:
        """Number of tokens in the longer of the two sequences."""
        return max(len(self.chosen_tokens), len(self.rejected_tokens))


def check_lengths(pairs: Sequence[TokenizedPair], seq_len: int) -> None:
    """Check that every sequence has at most `seq_len` tokens.

    Raises:
        DataError: a sequence is longer; the message names the first such pair.
    """
    for pair in pairs:
        if pair.longest > seq_len:
            raise DataError(
                f"pair {pair.prompt_id!r} has {pair.longest} tokens, more than seq_len {seq_len}; "
                f"raise the sequence length or prepare the pairs with a shorter max_length"
            )


def check_vocabulary(pairs: Sequence[TokenizedPair], pad_id: int, vocab_size: int) -> None:
    """Check that the padding token and all tokens of the pairs are in a vocabulary of `vocab_size` tokens.

    Raises:
        DataError: a token is outside the vocabulary.
    """
    if pad_id >= vocab_size:
        raise DataError(
            f"the padding token is {pad_id}, but the model knows tokens 0 to {vocab_size - 1}; use the model's own "
            "tokenizer"
        )
    for pair in pairs:
        largest = max(int(pair.chosen_tokens.max()), int(pair.rejected_tokens.max()))
        if largest >= vocab_size:
            raise DataError(
                f"pair {pair.prompt_id!r} contains token {largest}, but the model knows tokens 0 to {vocab_size - 1}; "
                "prepare the pairs with the model's own tokenizer"
            )


def tokens_digest(pairs: Sequence[TokenizedPair]) -> str:
    """Return the SHA-256 (hex) of the tokens of all pairs, in order, whatever their ids are."""
    digest = hashlib.sha256()
    for pair in pairs:
        starts = pair.chosen_response_start, pair.rejected_response_start
        digest.update(f"{starts} {len(pair.chosen_tokens)} {len(pair.rejected_tokens)}\n".encode())
        digest.update(pair.chosen_tokens.tobytes())
        digest.update(pair.rejected_tokens.tobytes())
    return digest.hexdigest()


def write_pairs(file: BinaryIO, pairs: Sequence[TokenizedPair]) -> None:
    """Write the pairs in Parquet format: prompt_id, two lists of int32 tokens, and the start of each answer."""
    table = pa.table(
        {
            "prompt_id": pa.array([pair.prompt_id for pair in pairs], pa.string()),
            "chosen_tokens": pa.array([pair.chosen_tokens for pair in pairs], pa.list_(pa.int32())),
            "rejected_tokens": pa.array([pair.rejected_tokens for pair in pairs], pa.list_(pa.int32())),
            "chosen_response_start": pa.array([pair.chosen_response_start for pair in pairs], pa.int32()),
            "rejected_response_start": pa.array([pair.rejected_response_start for pair in pairs], pa.int32()),
        }
    )
    pq.write_table(table, file)


def read_pairs(path: str) -> list[TokenizedPair]:
    """Read the pairs that `write_pairs` wrote, in the same order.

    Raises:
        DataError: the file is not Parquet or lacks a column.
        StorageError: the file cannot be read.
    """
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
            f"tokenized pairs; prepare the preference data first"
        )
    columns = [_token_rows(table[name]) if name.endswith("_tokens") else table[name].to_pylist() for name in names]
    return [TokenizedPair(*row) for row in zip(*columns, strict=True)]


def _token_rows(column: Any) -> list[Int32[np.ndarray, " _"]]:
    """Split one list column into rows that share its memory, which avoids a copy per row of a large dataset."""
    rows = column.combine_chunks()
    tokens = rows.values.to_numpy()
    offsets = rows.offsets.to_numpy()
    return [tokens[start:end] for start, end in pairwise(offsets)]
