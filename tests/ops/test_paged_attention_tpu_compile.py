"""The TPU backend compiled for a v5p on a machine without one, in settings where other engines failed on TPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled
from jax.typing import DTypeLike

from simpo_pipeline.distributed.compilation_cache import opened_cache
from simpo_pipeline.ops.paged_attention_tpu import TpuPagedAttention
from simpo_pipeline.ops.paged_batch import NewTokens, PagedSequences
from simpo_pipeline.ops.paged_tpu_blocks import KernelShape, blocks_for, vmem_bytes

pytest.importorskip("libtpu", reason="the compiler for TPUs is not installed: it comes with the extra `tpu`")

REPLICATED = PartitionSpec()
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.fixture(scope="module")
def v5p_host():
    """Return descriptions of the four chips of one host."""
    # jax writes cache entries for absent devices but cannot read them back.
    with pytest.MonkeyPatch.context() as patch, opened_cache(None):
        # Otherwise libtpu looks for the machine's metadata and for other processes that use a TPU.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield topologies.get_topology_desc(topology_name="v5p:2x2x1", platform="tpu").devices


def compile_one_layer(
    devices: list,
    *,
    num_single: int,
    num_chunks: int,
    chunk_tokens: int,
    num_pages: int,
    page_size: int,
    pages_per_seq: int,
    heads: int = 32,
    kv_heads: int = 8,
    head_size: int = 128,
    dtype: DTypeLike = jnp.bfloat16,
) -> Compiled:
    """Compile what a layer does with its pages, sharded over `devices` as in the engine."""
    mesh = Mesh(np.array(devices), ("model",))
    backend = TpuPagedAttention(mesh, "model")
    axis = "model" if kv_heads % len(devices) == 0 else None

    def shaped(shape: tuple[int, ...], dtype: DTypeLike, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def layer(q, k, v, page, slot, pages, *sequences):
        pages = backend.write(pages, NewTokens(k, v, page, slot))
        return backend.attend(q, pages, PagedSequences(*sequences, num_single=num_single)), pages

    tokens, seqs = num_single + chunk_tokens, num_single + num_chunks
    pages = jax.eval_shape(functools.partial(backend.empty, num_pages, page_size, kv_heads, head_size, dtype))
    integers = [shaped(shape, jnp.int32) for shape in ((seqs, pages_per_seq), (seqs + 1,), (seqs,))]
    arguments = (
        shaped((tokens, heads, head_size), dtype, None, axis),
        *(shaped((tokens, kv_heads, head_size), dtype, None, axis) for _ in "kv"),
        *(shaped((tokens,), jnp.int32) for _ in "ps"),
        tuple(shaped(array.shape, array.dtype, None, None, axis) for array in pages),
        *integers,
    )
    return jax.jit(layer, donate_argnums=5).lower(*arguments).compile()


def assert_pages_are_updated_in_place_without_collectives(compiled: Compiled, pages_bytes: int) -> None:
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= pages_bytes
    assert memory.temp_size_in_bytes < pages_bytes // 10
    text = compiled.as_text()
    assert text is not None
    assert not [name for name in COLLECTIVES if f" {name}" in text]


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_single": 64, "num_chunks": 64, "chunk_tokens": 4096, "num_pages": 1088, "page_size": 128},
        {"num_single": 128, "num_chunks": 32, "chunk_tokens": 512, "num_pages": 2304, "page_size": 128},
        {"num_single": 57, "num_chunks": 57, "chunk_tokens": 512, "num_pages": 4096, "page_size": 64},
        {"num_single": 64, "num_chunks": 0, "chunk_tokens": 0, "num_pages": 4224, "page_size": 64},
        {"num_single": 128, "num_chunks": 0, "chunk_tokens": 0, "num_pages": 2304, "page_size": 128},
        {"num_single": 256, "num_chunks": 64, "chunk_tokens": 4096, "num_pages": 4608, "page_size": 128},
        {"num_single": 0, "num_chunks": 16, "chunk_tokens": 1024, "num_pages": 4224, "page_size": 64},
    ],
    ids=["large_prefill", "128_seqs", "57_seqs", "over_4096_pages", "decode_128_seqs", "256_seqs", "chunks_only"],
)
def test_a_quarter_of_an_8b_model_compiles(v5p_host, sizes: dict[str, Any]) -> None:
    layers = 32
    sizes = {**sizes, "num_pages": layers * sizes["num_pages"], "pages_per_seq": -(-2560 // sizes["page_size"])}
    compiled = compile_one_layer(v5p_host, **sizes)
    assert_pages_are_updated_in_place_without_collectives(
        compiled, sizes["num_pages"] * sizes["page_size"] * 4 * 128 * 2
    )
    assert (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"') == bool(sizes["num_single"]) + bool(
        sizes["num_chunks"]
    )


@pytest.mark.parametrize(
    "model",
    [
        {"heads": 9, "kv_heads": 3, "head_size": 64},
        {"heads": 32, "kv_heads": 8, "head_size": 64},
        {"heads": 32, "kv_heads": 8, "head_size": 128, "dtype": jnp.float32},
    ],
    ids=["three_kv_heads_without_the_kernel", "half_a_vector_per_head", "float32"],
)
def test_other_models_compile(v5p_host, model: dict) -> None:
    sizes = {"num_single": 64, "num_chunks": 16, "chunk_tokens": 512, "num_pages": 4096, "page_size": 64}
    compile_one_layer(v5p_host, pages_per_seq=32, **sizes, **model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("max_queries", [8, 32])
def test_the_compiler_uses_no_more_vector_memory_than_computed(
    v5p_host, max_queries: int, tensor_parallel: int, page_size: int, dtype: str
) -> None:
    heads, kv_heads, seqs, pages_per_seq = 32 // tensor_parallel, 8 // tensor_parallel, 128, 40
    shape = KernelShape(page_size, pages_per_seq, heads, kv_heads, 128, jnp.dtype(dtype).itemsize)
    blocks = blocks_for(shape, max_queries)
    kernel = functools.partial(
        ragged_paged_attention,
        num_kv_pages_per_block=blocks.kv_pages,
        num_queries_per_block=blocks.queries,
        vmem_limit_bytes=vmem_bytes(shape, blocks),
    )
    mesh = Mesh(np.array(v5p_host[:1]), ("model",))
    shapes = [
        (512, heads, 128),
        (4096, page_size, 2 * kv_heads, 128),
        (seqs,),
        (seqs, pages_per_seq),
        (seqs + 1,),
        (1,),
    ]
    arguments = [
        jax.ShapeDtypeStruct(size, dtype if len(size) > 2 else jnp.int32, sharding=NamedSharding(mesh, REPLICATED))
        for size in shapes
    ]
    mapped = jax.shard_map(kernel, mesh=mesh, in_specs=(REPLICATED,) * 6, out_specs=REPLICATED, check_vma=False)
    jax.jit(mapped).lower(*arguments).compile()
