"""The keys and values of every layer, in pages, as one pytree that programs take and give back.

Layers are folded into the page index, so that the cache is carried from layer to layer and XLA updates it in place:
nothing is copied, neither per layer nor per step. How a page looks is the attention backend's business, which pages
belong to whom the scheduler's.
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
from jaxtyping import Array, Float, Int, Shaped

from simpo_pipeline.inference.config import EngineSizes
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES
from simpo_pipeline.ops.paged_attention import PagedAttention


class TokenPlaces(eqx.Module):
    """Where the tokens of a batch lie: one of each of `num_single` sequences, then the chunks of others, end to end."""

    page_table: Int[Array | np.ndarray, "seqs pages_per_seq"]  # a sequence's pages in order; any page after its last
    query_starts: Int[Array | np.ndarray, " seqs_and_end"]  # sequence s has tokens [query_starts[s], query_starts[s+1])
    kv_lens: Int[Array | np.ndarray, " seqs"]  # tokens of each sequence, those of this batch included; 0 for none
    pages: Int[Array, " tokens"]  # of its sequence's, the one that each token goes into
    positions: Int[Array | np.ndarray, " tokens"]  # in its sequence; -1 for a place in the batch that holds no token
    num_single: int = eqx.field(static=True)


class KVCache(eqx.Module):
    """Pages of keys and values."""

    pages: tuple[Shaped[Array, "layers_pages ..."], ...]
    num_pages: int = eqx.field(static=True)  # of each layer
    page_size: int = eqx.field(static=True)
    attention: PagedAttention = eqx.field(static=True)

    def attend(
        self,
        layer: Int[Array, ""],
        q: Float[Array, "tokens heads head_size"],
        k: Float[Array, "tokens kv_heads head_size"],
        v: Float[Array, "tokens kv_heads head_size"],
        places: TokenPlaces,
    ) -> tuple[Float[Array, "tokens heads head_size"], "KVCache"]:
        """Stores one layer's keys and values, then attends to all that each token's sequence has."""
        page_table = layer * self.num_pages + jnp.asarray(places.page_table)
        positions = jnp.asarray(places.positions)
        past_the_last = self.pages[0].shape[0]
        page = jnp.where(positions >= 0, layer * self.num_pages + places.pages, past_the_last)
        pages = self.attention.write(self.pages, k, v, page, positions % self.page_size)
        query_starts, kv_lens = jnp.asarray(places.query_starts), jnp.asarray(places.kv_lens)
        out = self.attention.attend(q, pages, page_table, query_starts, kv_lens, num_single=places.num_single)
        return out, dataclasses.replace(self, pages=pages)

    def copy(self, sources: Int[Array, " n"], targets: Int[Array, " n"]) -> "KVCache":
        """Copies pages of every layer; a target past the last page of a layer is no page."""
        num_layers = self.pages[0].shape[0] // self.num_pages

        def copy_layer(layer: Int[Array, ""], pages: tuple[Array, ...]) -> tuple[Array, ...]:
            first_page = layer * self.num_pages
            target = jnp.where(targets < self.num_pages, first_page + targets, self.pages[0].shape[0])
            return self.attention.copy(pages, first_page + sources, target)

        return dataclasses.replace(self, pages=lax.fori_loop(0, num_layers, copy_layer, self.pages))


def empty_cache(model: LlamaConfig, sizes: EngineSizes, dtype: DTypeLike, attention: PagedAttention) -> KVCache:
    """A cache of zeros for keys and values of `dtype`, to be traced."""
    pages = attention.empty(
        model.num_layers * sizes.num_pages, sizes.page_size, model.num_kv_heads, model.head_dim, dtype
    )
    return KVCache(pages, sizes.num_pages, sizes.page_size, attention)


def abstract_cache(
    model: LlamaConfig, sizes: EngineSizes, dtype: DTypeLike, mesh: Mesh, attention: PagedAttention
) -> KVCache:
    """The shapes of a cache, split over the mesh by key/value head where their number allows."""
    mesh_axis = TENSOR_PARALLEL_RULES["kv_heads"]
    splits = model.num_kv_heads % mesh.shape[mesh_axis] == 0
    spec = [None] * attention.kv_heads_axis + [mesh_axis if splits else None]
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    shapes = jax.eval_shape(lambda: empty_cache(model, sizes, dtype, attention))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def bytes_per_device(tree: object) -> int:
    """What each device holds of a pytree, given its shapes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
