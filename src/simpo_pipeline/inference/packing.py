"""Packing of many small arrays into one: a transfer to the devices costs the host as much for 4 bytes as for 1 kB."""

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
    """Return the concatenated bits of all leaves of a tree of NumPy arrays with 4-byte elements."""
    leaves = jax.tree.leaves(tree)
    assert all(leaf.dtype.itemsize == _WORD_BYTES for leaf in leaves), "leaves must have 4-byte elements"
    return np.concatenate([np.ascontiguousarray(leaf).reshape(-1).view(np.int32) for leaf in leaves])


def unpack(words: Int[Array, " words"], like: Tree) -> Tree:
    """Return the packed tree, inside a traced program; `like` has its structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(like)
    arrays = []
    start = 0
    for leaf in leaves:
        end = start + math.prod(leaf.shape)
        part = words[start:end].reshape(leaf.shape)
        arrays.append(part if leaf.dtype == jnp.int32 else lax.bitcast_convert_type(part, leaf.dtype))
        start = end
    return jax.tree.unflatten(structure, arrays)
