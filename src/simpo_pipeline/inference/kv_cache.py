"""The keys and values of every layer, in pages, as one pytree that programs take and give back.

Layers are folded into the page index, so that a scan over layers carries the whole cache and XLA updates it in
place: nothing is copied, neither per layer nor per step. Which pages belong to whom is the scheduler's business.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from simpo_pipeline.inference.config import EngineConfig
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES
from simpo_pipeline.ops.paged_attention import paged_attention, stored_dtype, write_pages


class TokenPlaces(eqx.Module):
    """Where the tokens of a ragged batch lie: tokens of one sequence stand together, in the order of its rows."""

    page_table: Int[Array | np.ndarray, "seqs pages_per_seq"]  # a sequence's pages in order; any page after its last
    query_starts: Int[Array | np.ndarray, " seqs_and_end"]  # sequence s has tokens [query_starts[s], query_starts[s+1])
    kv_lens: Int[Array | np.ndarray, " seqs"]  # tokens of each sequence, those of this batch included
    seqs: Int[Array | np.ndarray, " tokens"]  # which sequence each token is of
    positions: Int[Array | np.ndarray, " tokens"]  # in its sequence; -1 for a place in the batch that holds no token


class KVCache(eqx.Module):
    """Pages of keys and values, laid out as `ops.paged_attention` wants them."""

    keys: Shaped[Array, "layers_pages kv_heads head_size page_size"]
    values: Shaped[Array, "layers_pages kv_heads page_size head_size"]
    num_pages: int = eqx.field(static=True)

    def attend(
        self,
        layer: Int[Array, ""],
        q: Float[Array, "tokens heads head_size"],
        k: Float[Array, "tokens kv_heads head_size"],
        v: Float[Array, "tokens kv_heads head_size"],
        places: TokenPlaces,
        *,
        max_queries_per_seq: int,
    ) -> tuple[Float[Array, "tokens heads head_size"], "KVCache"]:
        """Stores one layer's keys and values, then attends to all that each token's sequence has."""
        page_size = self.keys.shape[3]
        first_page = layer * self.num_pages
        positions = jnp.asarray(places.positions)
        past_the_last = self.keys.shape[0]
        page = first_page + places.page_table[places.seqs, positions // page_size]
        page = jnp.where(positions >= 0, page, past_the_last)
        keys, values = write_pages(self.keys, self.values, k, v, page, positions % page_size)
        out = paged_attention(
            q,
            keys,
            values,
            first_page + places.page_table,
            jnp.asarray(places.query_starts),
            jnp.asarray(places.kv_lens),
            max_queries_per_seq=max_queries_per_seq,
        )
        return out, KVCache(keys, values, self.num_pages)


def empty_cache(model: LlamaConfig, engine: EngineConfig, dtype: DTypeLike) -> KVCache:
    """A cache of zeros for keys and values of `dtype`, to be traced."""
    leading = (model.num_layers * engine.total_pages, model.num_kv_heads)
    return KVCache(
        keys=jnp.zeros((*leading, model.head_dim, engine.page_size), stored_dtype(dtype)),
        values=jnp.zeros((*leading, engine.page_size, model.head_dim), stored_dtype(dtype)),
        num_pages=engine.total_pages,
    )


def abstract_cache(model: LlamaConfig, engine: EngineConfig, dtype: DTypeLike, mesh: Mesh) -> KVCache:
    """The shapes of a cache, split over the mesh by key/value head where their number allows."""
    mesh_axis = TENSOR_PARALLEL_RULES["kv_heads"]
    splits = model.num_kv_heads % mesh.shape[mesh_axis] == 0
    sharding = NamedSharding(mesh, PartitionSpec(None, mesh_axis if splits else None))
    shapes = jax.eval_shape(lambda: empty_cache(model, engine, dtype))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def bytes_per_device(cache: KVCache) -> int:
    """What each device holds of a cache, given its shapes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)
    )
