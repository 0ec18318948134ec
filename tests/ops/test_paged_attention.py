import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from numpy.random import Generator

from simpo_pipeline.ops import paged_gpu_kernel
from simpo_pipeline.ops.attention import causal_attention_reference
from simpo_pipeline.ops.paged_attention import PagedAttention, backend_for
from simpo_pipeline.ops.paged_attention_cpu import CpuPagedAttention
from simpo_pipeline.ops.paged_attention_gpu import GpuPagedAttention
from simpo_pipeline.ops.paged_attention_reference import ReferencePagedAttention
from simpo_pipeline.ops.paged_attention_tpu import TpuPagedAttention
from simpo_pipeline.ops.paged_batch import NewTokens, PagedSequences, Pages
from simpo_pipeline.ops.paged_xla import QueryTiles

# The TPU kernel does not support 3 key/value heads, so its backend falls back to plain XLA, which runs here.
KV_HEADS, HEADS, HEAD_SIZE = 3, 6, 16
CPU_MESH = Mesh(np.array(jax.devices("cpu")[:1]), ("model",))
REFERENCE = ReferencePagedAttention()
CPU = CpuPagedAttention()
GPU = GpuPagedAttention(CPU_MESH, "model")
FAST = [CPU, GPU, TpuPagedAttention(CPU_MESH, "model")]
ALL = [*FAST, REFERENCE]

fast_backends = pytest.mark.parametrize("backend", FAST, ids=lambda backend: backend.name)
all_backends = pytest.mark.parametrize("backend", ALL, ids=lambda backend: backend.name)


# Shared by all tests, so that equal shapes are traced once.
@functools.partial(jax.jit, static_argnums=0)
def write(backend: PagedAttention, pages: Pages, *tokens):
    return backend.write(pages, NewTokens(*tokens))


@functools.partial(jax.jit, static_argnums=0)
def copy(backend: PagedAttention, *arguments):
    return backend.copy(*arguments)


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_single")
def attend(backend: PagedAttention, q, pages: Pages, *sequences, num_single: int):
    return backend.attend(q, pages, PagedSequences(*sequences, num_single=num_single))


def freshly_traced() -> Callable[..., jax.Array]:
    """Return a fresh `attend` for a test that replaced a function it calls."""

    def attend_freshly_traced(backend: PagedAttention, q, pages: Pages, *sequences, num_single: int):
        return backend.attend(q, pages, PagedSequences(*sequences, num_single=num_single))

    return jax.jit(attend_freshly_traced, static_argnums=0, static_argnames="num_single")


@dataclasses.dataclass
class Batch:
    """Random sequences in scattered pages: `num_single` of one query each, then chunks, then padding tokens."""

    q: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]
    table: np.ndarray
    query_starts: np.ndarray
    kv_lens: np.ndarray
    num_single: int
    page_size: int

    def pages(self, backend: PagedAttention) -> Pages:
        """Return the keys and values; every other slot contains NaN as its key and a huge value."""
        num_pages = self.table.size + 3
        num_missing = num_pages * self.page_size - sum(map(len, self.k))
        every_slot = np.arange(num_pages * self.page_size, dtype=np.int32)
        k = np.full((every_slot.size, *self.k[0].shape[1:]), np.nan, self.q.dtype)
        v = np.full(k.shape, 1e29, self.q.dtype)
        empty = backend.empty(num_pages, self.page_size, KV_HEADS, HEAD_SIZE, self.q.dtype)
        pages = write(backend, empty, k, v, every_slot // self.page_size, every_slot % self.page_size)
        positions = [np.arange(len(keys)) for keys in self.k]
        page = np.concatenate([row[at // self.page_size] for row, at in zip(self.table, positions, strict=True)])
        slot = np.concatenate([at % self.page_size for at in positions]).astype(np.int32)
        # Padding without a page gives both writes the same shapes, so that they are one program.
        page = np.pad(page, (0, num_missing), constant_values=num_pages)
        slot = np.pad(slot, (0, num_missing))
        k, v = (np.concatenate([*rows, np.ones_like(k[:num_missing])]) for rows in (self.k, self.v))
        return write(backend, pages, k, v, page, slot)

    def attend(self, backend: PagedAttention, attend: Callable[..., jax.Array] = attend) -> np.ndarray:
        rest = self.table, self.query_starts, self.kv_lens
        return np.asarray(attend(backend, self.q, self.pages(backend), *rest, num_single=self.num_single))

    @functools.cached_property
    def expected(self) -> np.ndarray:
        return self.attend(REFERENCE)


def random_batch(
    rng: Generator,
    kv_lens: list[int],
    num_queries: list[int],
    page_size: int,
    *,
    num_single: int,
    padding: int = 0,
) -> Batch:
    pages_per_seq = -(-max(kv_lens) // page_size) + 1
    table = rng.permutation(len(kv_lens) * pages_per_seq + 3)[: len(kv_lens) * pages_per_seq]

    def normal(tokens: int, heads: int) -> np.ndarray:
        return rng.normal(size=(tokens, heads, HEAD_SIZE)).astype(np.float32)

    return Batch(
        q=normal(sum(num_queries) + padding, HEADS),
        k=[normal(size, KV_HEADS) for size in kv_lens],
        v=[normal(size, KV_HEADS) for size in kv_lens],
        table=table.reshape(-1, pages_per_seq).astype(np.int32),
        query_starts=np.concatenate([[0], np.cumsum(num_queries)]).astype(np.int32),
        kv_lens=np.array(kv_lens, np.int32),
        num_single=num_single,
        page_size=page_size,
    )


def described_gpu() -> AbstractContextManager[object]:
    """Return a context in which jax later than 0.10 lowers for a GPU where there is none."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return nullcontext()
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("model",), abstract_device=gpu))


def test_the_reference_is_causal_attention_over_each_sequence() -> None:
    batch = random_batch(np.random.default_rng(0), [7, 5, 9], [1, 5, 3], page_size=4, num_single=1)
    out = batch.attend(REFERENCE)
    whole = jax.jit(causal_attention_reference)
    for seq, (start, end) in enumerate(zip(batch.query_starts[:-1], batch.query_starts[1:], strict=True)):
        length = batch.kv_lens[seq]
        q = np.zeros((1, length, HEADS, HEAD_SIZE), np.float32)
        q[0, length - (end - start) :] = batch.q[start:end]
        expected = whole(q, batch.k[seq][None], batch.v[seq][None])[0, length - (end - start) :]
        np.testing.assert_allclose(out[start:end], expected, atol=1e-6)


@functools.cache
def single_queries(page_size: int) -> Batch:
    rng = np.random.default_rng(page_size)
    return random_batch(rng, rng.integers(1, 150, size=7).tolist(), [1] * 7, page_size, num_single=7)


@functools.cache
def mixed_batch(page_size: int) -> Batch:
    """Return 3 sequences of one query, 5 of any number, and 11 padding tokens. Tests must not change it."""
    rng = np.random.default_rng(page_size)
    num_queries = np.concatenate([np.ones(3, int), rng.integers(1, 40, size=5)])
    num_queries[[4, 5]] = 0, 2
    kv_lens = num_queries + rng.integers(0, 90, size=8) * rng.integers(0, 2, size=8)
    kv_lens[:2] = 30, 70
    return random_batch(rng, kv_lens.tolist(), num_queries.tolist(), page_size, num_single=3, padding=11)


@fast_backends
@pytest.mark.parametrize("page_size", [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 64)), 128])
def test_single_queries_equal_the_reference(backend: PagedAttention, page_size: int) -> None:
    batch = single_queries(page_size)
    np.testing.assert_allclose(batch.attend(backend), batch.expected, atol=2e-6)


@fast_backends
@pytest.mark.parametrize("num_single", [0, 3])
@pytest.mark.parametrize("page_size", [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 128)), 16])
def test_a_mixed_batch_equals_the_reference(backend: PagedAttention, page_size: int, num_single: int) -> None:
    batch = mixed_batch(page_size)
    got = dataclasses.replace(batch, num_single=num_single).attend(backend)
    np.testing.assert_allclose(got, batch.expected, atol=2e-6)


@pytest.mark.parametrize(("ranges_of_a_length", "group"), [(1, 2), (8, 3)])
def test_on_gpus_splitting_keys_into_ranges_does_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, ranges_of_a_length: int, group: int
) -> None:
    monkeypatch.setattr(paged_gpu_kernel, "_RANGES_OF_A_LENGTH", ranges_of_a_length)
    monkeypatch.setitem(globals(), "HEADS", group * KV_HEADS)
    lengths = [1, 511, 512, 513, 1023, 2100, 600]
    batch = random_batch(np.random.default_rng(0), lengths, [1] * 6 + [20], page_size=64, num_single=6)
    np.testing.assert_allclose(batch.attend(GPU, freshly_traced()), batch.expected, atol=2e-6)


def test_on_gpus_neither_the_width_of_the_page_table_nor_the_page_size_changes_a_bit() -> None:
    narrow = random_batch(np.random.default_rng(0), [30, 1500], [1, 1], page_size=64, num_single=2)
    wide = dataclasses.replace(narrow, table=np.pad(narrow.table, ((0, 0), (0, 120))))
    expected = narrow.attend(GPU)
    np.testing.assert_array_equal(wide.attend(GPU), expected)
    small_pages = random_batch(np.random.default_rng(0), [30, 1500], [1, 1], page_size=16, num_single=2)
    same = dataclasses.replace(small_pages, q=narrow.q, k=narrow.k, v=narrow.v)
    np.testing.assert_array_equal(same.attend(GPU), expected)


def test_ranges_of_keys_are_contiguous_and_get_longer() -> None:
    starts = [int(paged_gpu_kernel._range_start(part)) for part in range(42)]
    assert starts[:10] == [512 * part for part in range(9)] + [5120]
    lengths = np.diff(starts)
    assert lengths.tolist() == [512 << part // 8 for part in range(41)]
    assert starts[-1] > 131072


def test_on_gpus_unsupported_shapes_do_not_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [size for size in (8, 16, 48, 64, 80, 128, 256) if paged_gpu_kernel.takes(64, size, 2)] == [16, 64, 128, 256]
    assert not paged_gpu_kernel.takes(64, 256, 4)
    assert not paged_gpu_kernel.takes(256, 64, 2)
    monkeypatch.setattr(paged_gpu_kernel, "takes", lambda rows, head_size, itemsize: False)
    monkeypatch.setattr(paged_gpu_kernel, "attend_in_ranges", None)
    batch = mixed_batch(16)
    np.testing.assert_allclose(batch.attend(GPU, freshly_traced()), batch.expected, atol=2e-6)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(9, 3, 64), (32, 8, 128), (64, 8, 128)])
def test_the_kernel_can_be_lowered_without_a_gpu(dtype: str, heads: int, kv_heads: int, head_size: int) -> None:
    def run(q, positions, table, keys, values):
        tiles = QueryTiles(q, positions, table, is_single=q.shape[2] < 16)
        return paged_gpu_kernel.attend_in_ranges(tiles, keys, values)

    pages = jax.ShapeDtypeStruct((200_000, 64, kv_heads, head_size), dtype)
    for tiles, queries in ((128, 1), (160, 16)):
        rows = queries * heads // kv_heads
        q = jax.ShapeDtypeStruct((tiles, kv_heads, rows, head_size), dtype)
        integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((tiles, rows), (tiles, 34))]
        with described_gpu():
            traced = jax.jit(run).trace(q, *integers, pages, pages)
            assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


@all_backends
def test_padding_queries_give_zeros(backend: PagedAttention) -> None:
    batch = mixed_batch(16)
    kv_lens = np.where(np.isin(np.arange(8), [0, 4]), 0, batch.kv_lens)
    out = dataclasses.replace(batch, kv_lens=kv_lens).attend(backend)
    assert not out[[0, *range(-11, 0)]].any()
    assert out[1:-11].all()


@all_backends
def test_a_batch_without_any_query_gives_zeros(backend: PagedAttention) -> None:
    batch = mixed_batch(16)
    nothing = dataclasses.replace(
        batch,
        query_starts=np.zeros_like(batch.query_starts),
        kv_lens=np.zeros_like(batch.kv_lens),
        num_single=0,
    )
    assert not nothing.attend(backend).any()


@fast_backends
@pytest.mark.parametrize("num_queries", [1, 20])
def test_a_sequence_gets_the_same_bits_for_any_lengths_of_the_others(backend: PagedAttention, num_queries: int) -> None:
    num_single = 3 if num_queries == 1 else 0
    rng = np.random.default_rng(0)
    batch = random_batch(rng, [30, 2000, 50], [num_queries] * 3, page_size=16, num_single=num_single)
    beside_long = batch.attend(backend).reshape(3, -1)
    batch.kv_lens[1] = num_queries
    beside_short = batch.attend(backend).reshape(3, -1)
    assert (beside_long[1] != beside_short[1]).any()
    np.testing.assert_array_equal(beside_long[[0, 2]], beside_short[[0, 2]])


@fast_backends
def test_a_single_query_gets_the_same_bits_with_and_without_chunks_beside_it(backend: PagedAttention) -> None:
    mixed = mixed_batch(16)
    rest = mixed.table[:3], mixed.query_starts[:4], mixed.kv_lens[:3]
    alone = attend(backend, mixed.q[:3], mixed.pages(backend), *rest, num_single=3)
    np.testing.assert_array_equal(np.asarray(alone), mixed.attend(backend)[:3])


@all_backends
def test_a_page_past_the_last_one_is_not_written(backend: PagedAttention) -> None:
    empty = backend.empty(2, 4, 1, 2, jnp.float32)
    k = np.arange(1, 7, dtype=np.float32).reshape(3, 1, 2)
    page, slot = np.array([1, 2, 7], np.int32), np.array([3, 0, 0], np.int32)
    some = write(backend, empty, k, k, page, slot)
    one = write(backend, empty, k[:1], k[:1], page[:1], slot[:1])
    assert sum(np.count_nonzero(array) for array in one) == 4
    jax.tree.map(np.testing.assert_array_equal, some, one)


@all_backends
def test_copies_read_all_pages_before_they_write_any(backend: PagedAttention) -> None:
    empty = backend.empty(4, 1, 1, 2, jnp.float32)
    k = np.arange(1, 9, dtype=np.float32).reshape(4, 1, 2)
    page, slot = np.arange(4, dtype=np.int32), np.zeros(4, np.int32)
    pages = write(backend, empty, k, k, page, slot)
    source, target = np.array([0, 1, 2, 9], np.int32), np.array([1, 2, 4, 9], np.int32)
    copied = copy(backend, pages, source, target)
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old[np.array([0, 0, 1, 3])]), copied, pages)


@fast_backends
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_non_finite_or_huge_value_affects_only_its_own_sequence(backend: PagedAttention, value: float) -> None:
    batch = random_batch(np.random.default_rng(0), [5, 40], [1, 1], page_size=64, num_single=2)
    expected = batch.attend(backend)[0]
    batch.v[1][:] = value
    batch.table[0] = batch.table[1]
    batch.v[0] = np.concatenate([batch.v[0]])
    shared = dataclasses.replace(batch, k=batch.k[::-1], v=batch.v[::-1], table=batch.table[::-1].copy())
    rest = batch.table, batch.query_starts, batch.kv_lens
    out = attend(backend, batch.q, shared.pages(backend), *rest, num_single=2)
    np.testing.assert_array_equal(np.asarray(out)[0], expected)


@all_backends
def test_bfloat16_stays_close_to_float32(backend: PagedAttention) -> None:
    exact = mixed_batch(16)
    q, k, v = jax.tree.map(lambda array: array.astype(jnp.bfloat16), (exact.q, exact.k, exact.v))
    rounded = dataclasses.replace(exact, q=q, k=k, v=v).attend(backend)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(np.float32), exact.attend(backend), atol=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_cpu_pages_are_read_and_written_in_place(dtype: str) -> None:
    def run(q, pages, table, query_starts, kv_lens):
        pages = CPU.write(pages, NewTokens(q[:, :2], q[:, 2:4], kv_lens // 16, kv_lens % 16))
        return CPU.attend(q, pages, PagedSequences(table, query_starts, kv_lens, num_single=2)), pages

    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 8), (5,), (4,))]
    pages = jax.eval_shape(lambda: CPU.empty(10_000, 16, 2, 8, dtype))
    q = jax.ShapeDtypeStruct((4, 6, 8), dtype)
    memory = jax.jit(run, donate_argnums=1).lower(q, pages, *integers).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 2 * 10_000 * 2 * 8 * 16 * jnp.dtype(dtype).itemsize
    assert memory.temp_size_in_bytes < 200_000


@all_backends
def test_backends_compare_and_hash_by_value(backend: PagedAttention) -> None:
    assert isinstance(backend, PagedAttention)
    assert backend == dataclasses.replace(backend)  # pyright: ignore[reportArgumentType]
    assert hash(backend) == hash(dataclasses.replace(backend))  # pyright: ignore[reportArgumentType]


def test_the_backend_follows_the_devices_of_the_mesh() -> None:
    assert backend_for(CPU_MESH, "model") == CPU
