import pytest

from simpo_pipeline.ops.paged_tpu_blocks import VMEM_LIMIT_BYTES, Blocks, KernelShape, blocks_for, vmem_bytes

LLAMA_8B = {"heads": 32, "kv_heads": 8, "head_size": 128}


def share_of_llama_8b(tensor_parallel: int, page_size: int, pages_per_seq: int, itemsize: int = 2) -> KernelShape:
    heads, kv_heads = LLAMA_8B["heads"] // tensor_parallel, LLAMA_8B["kv_heads"] // tensor_parallel
    return KernelShape(page_size, pages_per_seq, heads, kv_heads, LLAMA_8B["head_size"], itemsize)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("page_size", [16, 64, 128, 256])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_blocks_fit_in_vector_memory_and_in_the_page_table(tensor_parallel: int, page_size: int, itemsize: int) -> None:
    for pages_per_seq in range(1, 41):
        shape = share_of_llama_8b(tensor_parallel, page_size, pages_per_seq, itemsize)
        for max_queries in (8, 32):
            blocks = blocks_for(shape, max_queries)
            assert vmem_bytes(shape, blocks) < VMEM_LIMIT_BYTES
            assert 1 <= blocks.kv_pages <= pages_per_seq
            assert 1 <= blocks.queries <= max_queries


def test_the_blocks_of_a_quarter_of_an_8b_model_are_as_intended() -> None:
    assert blocks_for(share_of_llama_8b(4, 128, 32), 32) == Blocks(kv_pages=4, queries=32)
    assert blocks_for(share_of_llama_8b(4, 64, 40), 8) == Blocks(kv_pages=8, queries=8)
    assert blocks_for(share_of_llama_8b(4, 128, 1), 8) == Blocks(kv_pages=1, queries=8)


def test_if_memory_is_short_queries_are_reduced_before_pages() -> None:
    assert blocks_for(share_of_llama_8b(1, 128, 32), 32) == Blocks(kv_pages=4, queries=16)


def test_a_page_that_does_not_fit_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="Decrease page_size"):
        blocks_for(share_of_llama_8b(1, 4096, 2), 8)
