"""Which pairs are held out for evaluation: a pure function of their prompts' ids."""

import hashlib
from collections.abc import Sequence

from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.errors import ConfigError, DataError


def is_held_out(prompt_id: str, fraction: float) -> bool:
    """Whether the pairs of a prompt are held out when about `fraction` of all are; the same on every machine."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8]) < fraction * 2**64


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
        sides[is_held_out(pair.prompt_id, fraction)].append(pair)
    train, held_out = sides
    if not train or (fraction and not held_out):
        raise DataError(
            f"validation_fraction {fraction} of {len(pairs)} pairs leaves {len(train)} to train on and {len(held_out)} "
            "to evaluate on; give another fraction, or more pairs"
        )
    return train, held_out
