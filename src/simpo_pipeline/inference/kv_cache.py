"""The paged key/value cache of all layers, as one pytree that programs take and return.

Layers are folded into the page index, so the cache is carried from layer to layer and XLA updates it in place, without
copies per layer or per step. The attention backend owns the page layout; the scheduler owns the assignment of pages to
sequences.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from simpo_pipeline.inference.config import EngineSizes
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES
from simpo_pipeline.ops.paged_attention import PagedAttention
from simpo_pipeline.ops.paged_batch import NewTokens, PagedSequences, Pages

# Larger values may be stored as 0 (`PagedAttention.write`).
_LARGEST_VALUE = 1e30


class TokenLocations(eqx.Module):
    """Cache locations of a batch's tokens. Page indices are those of the first layer."""

    sequences: PagedSequences
    pages: Int[Array, " tokens"]  # page that each token is written to
    positions: Int[Array, " tokens"]  # position in the sequence; -1 for padding


class KVCache(eqx.Module):
    """Paged cache of keys and values."""

    pages: Pages  # the pages of the first layer, then those of the second, and so on
    num_pages: int = eqx.field(static=True)  # per layer
    page_size: int = eqx.field(static=True)
    attention: PagedAttention = eqx.field(static=True)

    def attend(
        self,
        layer: Int[Array, ""],
        q: Float[Array, "tokens heads head_size"],
        k: Float[Array, "tokens kv_heads head_size"],
        v: Float[Array, "tokens kv_heads head_size"],
        locations: TokenLocations,
    ) -> tuple[Float[Array, "tokens heads head_size"], "KVCache"]:
        """Write one layer's keys and values, then attend to all cached tokens of each token's sequence."""
        sequences, positions = locations.sequences, locations.positions
        page_table = layer * self.num_pages + sequences.page_table
        past_the_last = self.pages[0].shape[0]
        page = jnp.where(positions >= 0, layer * self.num_pages + locations.pages, past_the_last)
        pages = self.attention.write(self.pages, NewTokens(_marked(k, v), v, page, positions % self.page_size))
        out = self.attention.attend(q, pages, dataclasses.replace(sequences, page_table=page_table))
        return out, dataclasses.replace(self, pages=pages)

    def copy(self, sources: Int[Array, " n"], targets: Int[Array, " n"]) -> "KVCache":
        """Copy pages in every layer; a target past the last page of a layer skips that copy."""
        num_layers = self.pages[0].shape[0] // self.num_pages

        def copy_layer(layer: Int[Array, ""], pages: Pages) -> Pages:
            first_page = layer * self.num_pages
            target = jnp.where(targets < self.num_pages, first_page + targets, self.pages[0].shape[0])
            return self.attention.copy(pages, first_page + sources, target)

        return dataclasses.replace(self, pages=lax.fori_loop(0, num_layers, copy_layer, self.pages))


def _marked(
    k: Float[Array, "tokens kv_heads head_size"], v: Float[Array, "tokens kv_heads head_size"]
) -> Float[Array, "tokens kv_heads head_size"]:
    """Return the keys, with NaN where the value is one that a backend may store as 0.

    Attention to such a token, and then the logits, become NaN, which stops generation. Otherwise they would be computed
    from zeros, and nobody would notice. One NaN in a key is enough, so no reduction is needed.
    """
    return jnp.where(jnp.abs(v.astype(jnp.float32)) <= _LARGEST_VALUE, k, jnp.full((), jnp.nan, k.dtype))


def empty_cache(model: LlamaConfig, sizes: EngineSizes, dtype: DTypeLike, attention: PagedAttention) -> KVCache:
    """Return a cache of zeros for keys and values of `dtype`; for use inside a traced program."""
    pages = attention.empty(
        model.num_layers * sizes.num_pages, sizes.page_size, model.num_kv_heads, model.head_dim, dtype
    )
    return KVCache(pages, sizes.num_pages, sizes.page_size, attention)


def abstract_cache(
    model: LlamaConfig, sizes: EngineSizes, dtype: DTypeLike, mesh: Mesh, attention: PagedAttention
) -> KVCache:
    """Return the shapes of a cache, sharded over the mesh by key/value head if the number of heads is divisible."""
    mesh_axis = TENSOR_PARALLEL_RULES["kv_heads"]
    splits = model.num_kv_heads % mesh.shape[mesh_axis] == 0
    spec = [None] * attention.kv_heads_axis + [mesh_axis if splits else None]
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    shapes = jax.eval_shape(lambda: empty_cache(model, sizes, dtype, attention))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def bytes_per_device(tree: object) -> int:
    """Return the bytes per device of a pytree, from its shapes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
