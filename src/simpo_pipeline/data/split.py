"""Which pairs are held out for evaluation: a pure function of their prompts' tokens.

Not of their ids: data without any has one for every row, and pairs of one prompt must not part.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.errors import ConfigError, DataError


def is_held_out(prompt: Int32[np.ndarray, " tokens"], fraction: float) -> bool:
    """Whether the pairs of a prompt are held out when about `fraction` of all are; the same on every machine."""
    digest = hashlib.sha256(prompt.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def split_pairs(pairs: Sequence[TokenizedPair], fraction: float) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """(pairs to train on, pairs held out), each in their order; pairs of one prompt are on one side.

    Raises:
        ConfigError: the fraction is not in [0, 1).
        DataError: nothing is left on one side, though some should be.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"validation_fraction is {fraction}: give a number from 0 to 1 (1 excluded)")
    sides: tuple[list[TokenizedPair], list[TokenizedPair]] = ([], [])
    for pair in pairs:
        sides[is_held_out(pair.chosen_tokens[: pair.chosen_response_start], fraction)].append(pair)
    train, held_out = sides
    if not train or (fraction and not held_out):
        raise DataError(
            f"validation_fraction {fraction} of {len(pairs)} pairs leaves {len(train)} to train on and {len(held_out)} "
            "to evaluate on; give another fraction, or more pairs"
        )
    return train, held_out
