"""Tokenised preference pairs: the value the loader serves.

Knows token ids and where an answer begins. Does not know text, tokenizers or models.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from simpo_pipeline.errors import DataError


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
