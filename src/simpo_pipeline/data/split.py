"""The split into training pairs and pairs held out for evaluation: a pure function of the prompts' tokens.

Ids are not used: data without ids gets a new one for every row, and pairs with the same prompt must stay together.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.errors import ConfigError, DataError


def is_held_out(prompt: Int32[np.ndarray, " tokens"], fraction: float) -> bool:
    """Return whether the pairs of a prompt are among the `fraction` that is held out; the same on every machine."""
    digest = hashlib.sha256(prompt.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def split_pairs(pairs: Sequence[TokenizedPair], fraction: float) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Return (training pairs, held-out pairs), each in the given order; pairs with the same prompt stay together.

    Raises:
        ConfigError: the fraction is not in [0, 1).
        DataError: one side is empty although it should not be.
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
