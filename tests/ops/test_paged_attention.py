import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike
from numpy.random import Generator

from simpo_pipeline.ops.attention import causal_attention_reference
from simpo_pipeline.ops.paged_attention import paged_attention, paged_attention_reference, stored_dtype, write_pages

KV_HEADS, HEADS, HEAD_SIZE = 2, 6, 8


class Batch:
    """Random sequences whose keys and values lie in scattered pages; every other slot of the cache holds NaN."""

    def __init__(
        self,
        rng: Generator,
        kv_lens: list[int],
        num_queries: list[int],
        page_size: int,
        padding: int = 0,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        pages_per_seq = -(-max(kv_lens) // page_size) + 1
        num_pages = len(kv_lens) * pages_per_seq + 3
        self.kv_lens = np.array(kv_lens, np.int32)
        self.query_starts = np.concatenate([[0], np.cumsum(num_queries)]).astype(np.int32)
        self.table = rng.permutation(num_pages)[: len(kv_lens) * pages_per_seq].reshape(-1, pages_per_seq)
        self.table = self.table.astype(np.int32)
        self.max_queries = max(num_queries)
        self.q = rng.normal(size=(sum(num_queries) + padding, HEADS, HEAD_SIZE)).astype(dtype)
        self.k = [rng.normal(size=(size, KV_HEADS, HEAD_SIZE)).astype(dtype) for size in kv_lens]
        self.v = [rng.normal(size=(size, KV_HEADS, HEAD_SIZE)).astype(dtype) for size in kv_lens]
        keys = np.full((num_pages, KV_HEADS, HEAD_SIZE, page_size), np.nan, dtype).view(stored_dtype(dtype))
        values = np.full((num_pages, KV_HEADS, page_size, HEAD_SIZE), np.nan, dtype).view(stored_dtype(dtype))
        positions = [np.arange(size) for size in kv_lens]
        pages = np.concatenate([row[at // page_size] for row, at in zip(self.table, positions, strict=True)])
        slots = np.concatenate([at % page_size for at in positions]).astype(np.int32)
        k, v = np.concatenate(self.k), np.concatenate(self.v)
        self.keys, self.values = jax.jit(write_pages)(keys, values, k, v, pages, slots)

    def arguments(self) -> tuple:
        return self.q, self.keys, self.values, self.table, self.query_starts, self.kv_lens

    def attend(self, body) -> np.ndarray:
        function = jax.jit(body, static_argnames="max_queries_per_seq")
        return np.asarray(function(*self.arguments(), max_queries_per_seq=self.max_queries))


def test_the_reference_is_causal_attention_over_each_sequence() -> None:
    batch = Batch(np.random.default_rng(0), [5, 9], [5, 3], page_size=4)
    out = batch.attend(paged_attention_reference)
    whole = jax.jit(causal_attention_reference)
    first = whole(batch.q[None, :5], batch.k[0][None], batch.v[0][None])[0]
    np.testing.assert_allclose(out[:5], first, atol=1e-6)
    last_three_of_nine = np.concatenate([np.zeros((6, HEADS, HEAD_SIZE), np.float32), batch.q[5:8]])
    second = whole(last_three_of_nine[None], batch.k[1][None], batch.v[1][None])[0, 6:]
    np.testing.assert_allclose(out[5:8], second, atol=1e-6)


@pytest.mark.parametrize("page_size", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("seed", range(2))
def test_decoding_equals_the_reference_over_random_page_tables(page_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kv_lens = rng.integers(1, 150, size=7).tolist()
    batch = Batch(rng, kv_lens, [1] * 7, page_size)
    np.testing.assert_allclose(batch.attend(paged_attention), batch.attend(paged_attention_reference), atol=2e-6)


@pytest.mark.parametrize("page_size", [1, 4, 16, 128])
@pytest.mark.parametrize("seed", range(3))
def test_ragged_queries_equal_the_reference_over_random_page_tables(page_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_queries = rng.integers(0, 40, size=5)
    num_queries[2] = 2
    kv_lens = num_queries + rng.integers(0, 90, size=5) * rng.integers(0, 2, size=5)
    batch = Batch(rng, kv_lens.tolist(), num_queries.tolist(), page_size, padding=11)
    np.testing.assert_allclose(batch.attend(paged_attention), batch.attend(paged_attention_reference), atol=2e-6)


@pytest.mark.parametrize("body", [paged_attention, paged_attention_reference])
def test_queries_without_a_sequence_or_without_keys_give_zeros(body) -> None:
    batch = Batch(np.random.default_rng(0), [4, 7], [4, 2], page_size=4, padding=3)
    assert not batch.attend(body)[6:].any()
    decode = Batch(np.random.default_rng(0), [4, 7], [1, 1], page_size=4)
    decode.kv_lens[0] = 0
    out = decode.attend(body)
    assert not out[0].any()
    assert out[1].all()


@pytest.mark.parametrize("num_queries", [1, 20])
def test_a_sequence_gets_the_same_bits_whatever_the_lengths_of_the_others(num_queries: int) -> None:
    batch = Batch(np.random.default_rng(0), [30, 2000, 50], [num_queries] * 3, page_size=16)
    beside_long = batch.attend(paged_attention).reshape(3, -1)
    batch.kv_lens[1] = num_queries
    beside_short = batch.attend(paged_attention).reshape(3, -1)
    assert (beside_long[1] != beside_short[1]).any()
    np.testing.assert_array_equal(beside_long[[0, 2]], beside_short[[0, 2]])


def test_a_page_past_the_last_one_is_not_written() -> None:
    keys, values = np.zeros((2, 1, 2, 4), np.float32), np.zeros((2, 1, 4, 2), np.float32)
    k = v = np.ones((3, 1, 2), np.float32)
    pages, slots = np.array([1, 2, 7], np.int32), np.array([3, 0, 0], np.int32)
    keys, values = jax.jit(write_pages)(keys, values, k, v, pages, slots)
    expected = np.zeros((2, 4), np.float32)
    expected[1, 3] = 1
    np.testing.assert_array_equal(np.asarray(keys)[:, 0, 0], expected)
    np.testing.assert_array_equal(np.asarray(values)[:, 0, :, 0], expected)


@pytest.mark.parametrize("body", [paged_attention, paged_attention_reference])
def test_bfloat16_is_stored_as_bits_and_stays_near_float32(body) -> None:
    batch = Batch(np.random.default_rng(0), [20, 45], [20, 3], page_size=8)
    exact = batch.attend(body)
    halved = Batch(np.random.default_rng(0), [20, 45], [20, 3], page_size=8, dtype=jnp.bfloat16)
    assert halved.keys.dtype == halved.values.dtype == jnp.uint16
    rounded = halved.attend(body)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(np.float32), exact, atol=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_are_read_and_written_in_place(dtype: str) -> None:
    def run(q, keys, values, *rest):
        table, query_starts, kv_lens = rest
        keys, values = write_pages(keys, values, q[:, :2], q[:, 2:4], kv_lens // 16, kv_lens % 16)
        return paged_attention(q, keys, values, table, query_starts, kv_lens, max_queries_per_seq=1), keys, values

    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 8), (5,), (4,))]
    keys = jax.ShapeDtypeStruct((10_000, 2, 8, 16), stored_dtype(dtype))
    values = jax.ShapeDtypeStruct((10_000, 2, 16, 8), stored_dtype(dtype))
    q = jax.ShapeDtypeStruct((4, 6, 8), dtype)
    memory = jax.jit(run, donate_argnums=(1, 2)).lower(q, keys, values, *integers).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 2 * 10_000 * 2 * 8 * 16 * stored_dtype(dtype).itemsize
    assert memory.temp_size_in_bytes < 100_000
