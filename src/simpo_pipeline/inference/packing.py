"""Many small arrays as one: a transfer to the devices costs the host the same for a kilobyte as for four bytes."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

Tree = TypeVar("Tree")

_WORD_BYTES = 4


def pack(tree: Any) -> Int[np.ndarray, " words"]:
    """All leaves of a tree of numpy arrays of 4-byte numbers, end to end, as their bits."""
    leaves = jax.tree.leaves(tree)
    assert all(leaf.dtype.itemsize == _WORD_BYTES for leaf in leaves), "numbers of 4 bytes are packed"
    return np.concatenate([np.ascontiguousarray(leaf).reshape(-1).view(np.int32) for leaf in leaves])


def unpack(words: Int[Array, " words"], like: Tree) -> Tree:
    """The tree that was packed, inside a program; `like` has its structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(like)
    found = []
    start = 0
    for leaf in leaves:
        end = start + math.prod(leaf.shape)
        part = words[start:end].reshape(leaf.shape)
        found.append(part if leaf.dtype == jnp.int32 else lax.bitcast_convert_type(part, leaf.dtype))
        start = end
    return jax.tree.unflatten(structure, found)
