import bisect
import dataclasses
from typing import Any

import pytest
from jax.sharding import Mesh
from tiny_model import TINY

from simpo_pipeline.distributed.programs import Program, Programs
from simpo_pipeline.errors import CapacityError
from simpo_pipeline.inference.config import EngineConfig, EngineSizes, SamplingParams
from simpo_pipeline.inference.engine_programs import EnginePrograms
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.inference.sizing import Workload, available_memory_bytes, size_engine
from simpo_pipeline.model.config import LlamaConfig

PAGE_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, keys and values, heads, head size, slots, bytes
PLENTY = 2**32


def work_of(*shapes: tuple[int, int]) -> Workload:
    """Return the totals of requests with these numbers of (prompt tokens, new tokens)."""
    return Workload.of([Request((1,) * size, 0, 0, SamplingParams(new)) for size, new in shapes])


def size(config: EngineConfig, work: Workload, mesh: Mesh, memory_bytes: int = PLENTY) -> EngineSizes:
    return size_engine(config, TINY, "float32", work, mesh, memory_bytes)


def test_work_is_counted_and_merged_to_the_maximum_of_each_field() -> None:
    ours, theirs = work_of((5, 7), (9, 1)), work_of((2, 30))
    assert ours == Workload(num_requests=2, longest_prompt=9, longest_total=12, total_tokens=22)
    assert Workload.merged([ours, theirs]) == Workload(2, 9, 32, 32)
    assert Workload.of([]) == Workload(0, 0, 0, 0)
    adjusted = Workload.of([Request((1,), 0, 0, SamplingParams(1, bad_words=("a",)))])
    assert adjusted == Workload(1, 1, 2, 2, adjusts_logits=True)
    assert Workload.merged([ours, adjusted]).adjusts_logits and not ours.adjusts_logits


def test_sizes_follow_the_work(mesh: Mesh) -> None:
    sizes = size(EngineConfig(page_size=16), work_of((20, 30), (5, 6)), mesh)
    assert (sizes.max_seqs, sizes.max_seq_len) == (2, 50)
    assert sizes.num_pages == 61 // 16 + 1 + 2
    assert sizes.prefill_chunk_tokens == 128
    assert size(EngineConfig(page_size=16), work_of((200, 30), *[(90, 30)] * 100), mesh).prefill_chunk_tokens == 2048


def test_given_sizes_are_kept(mesh: Mesh) -> None:
    given = EngineConfig(max_seqs=3, max_seq_len=100, page_size=8, num_pages=77, prefill_chunk_tokens=32)
    sizes = size(given, work_of(*[(20, 30)] * 3), mesh)
    assert sizes == EngineSizes(3, 100, 8, 77, prefill_chunk_tokens=32, decode_steps_per_call=32)
    # Except that max_seqs never exceeds the number of requests.
    assert size(given, work_of((20, 30)), mesh).max_seqs == 1


def test_memory_limits_the_number_of_pages(mesh: Mesh) -> None:
    work = work_of(*[(100, 100)] * 50)
    roomy = size(EngineConfig(page_size=16), work, mesh)
    thirteen = EngineConfig(page_size=16, num_pages=13)
    least = bisect.bisect_left(range(PLENTY), True, key=lambda size_: _fits(thirteen, work, mesh, size_))
    tight = size(EngineConfig(page_size=16), work, mesh, least + 100 * PAGE_BYTES)
    assert roomy.num_pages == 50 * 13 and 100 < tight.num_pages < 130


class OnlyAdjustedDecode(Programs):
    """Compiles the programs that decode with adjustments, which need the most memory for sampling, and no others."""

    def compile(self, name: str, function: Any, *abstract_args: Any, **how: Any) -> Program:
        if not (name.startswith("engine_decode") and name.endswith("_adjusted")):
            return object.__new__(Program)
        return super().compile(name, function, *abstract_args, **how)


def test_the_memory_of_programs_with_adjustments_is_counted_where_requests_need_them(mesh: Mesh) -> None:
    # The vocabulary is so large that sampling needs nearly all the memory.
    model = dataclasses.replace(TINY, vocab_size=2**15, num_layers=1)
    config, work = EngineConfig(page_size=16, num_pages=8, memory_utilization=1.0), work_of(*[(20, 30)] * 64)
    sizes = size_engine(config, model, "float32", work, mesh, PLENTY)
    programs = EnginePrograms(model, sizes, mesh, OnlyAdjustedDecode(), "float32")
    programs.compile_adjusted()
    (temporary,) = (each.memory_bytes.temporary for each in programs.all if hasattr(each, "name"))

    def least_bytes(work: Workload) -> int:
        return bisect.bisect_left(range(PLENTY), True, key=lambda free: _fits(config, work, mesh, free, model))

    counted = least_bytes(dataclasses.replace(work, adjusts_logits=True))
    assert temporary < counted - 2 * programs.weights_bytes - programs.cache_bytes < 1.2 * temporary
    counts = 4 * sizes.max_seqs * model.vocab_size
    assert counts < counted - least_bytes(work) < 1.5 * counts


def _fits(config: EngineConfig, work: Workload, mesh: Mesh, memory_bytes: int, model: LlamaConfig = TINY) -> bool:
    try:
        size_engine(config, model, "float32", work, mesh, memory_bytes)
    except CapacityError:
        return False
    return True


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            EngineConfig(page_size=16, num_pages=10**9),
            r"1000000000 pages of 8192 bytes \(requested by engine\.num_pages",
        ),
        (EngineConfig(page_size=16, memory_utilization=1e-6), r"4 pages .*the minimum for the longest sequence"),
    ],
)
def test_sizes_beyond_memory_are_refused_with_the_needed_and_available_memory(
    config: EngineConfig, message: str, mesh: Mesh
) -> None:
    with pytest.raises(CapacityError, match=message) as error:
        size(config, work_of((20, 30)), mesh)
    assert "memory_utilization" in str(error.value)


def test_the_available_memory_of_the_machine_is_known(mesh: Mesh) -> None:
    alone = available_memory_bytes(mesh)
    assert 2**28 < alone < 2**44
    assert available_memory_bytes(mesh, 4) == pytest.approx(alone / 4, rel=0.2)
