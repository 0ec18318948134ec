"""The figures of one program: seconds and bytes from the compiler's text, the work and the chips."""

import dataclasses

import jax
import pytest

from simpo_pipeline.distributed.programs import lower_program
from simpo_pipeline.preflight.compiled import CompilerResult
from simpo_pipeline.preflight.examine import HOP_SECONDS, PlannedLaunch, examine
from simpo_pipeline.preflight.roofline import ProgramWork
from simpo_pipeline.preflight.topology import V5P

MEMORY = {"argument": 100, "output": 50, "alias": 40, "temp": 30, "generated_code": 5}


@dataclasses.dataclass(frozen=True)
class Described:
    coords: tuple[int, int, int]


def planned(turns: int = 64) -> PlannedLaunch:
    devices = frozenset(Described((x, y, 0)) for x in range(2) for y in range(2))
    lowered = lower_program("decode", lambda x: x + x, jax.ShapeDtypeStruct((4,), "float32"))
    lowered = dataclasses.replace(lowered, devices=devices)
    work = ProgramWork(flops=459e9, hbm_bytes=4 * 2765e6, kernel_hbm_bytes=2765e6, scopes=("draw",))
    return PlannedLaunch(lowered, work, host=1, turns=turns)


def test_a_loop_iteration_counts_its_cycles_and_its_share_of_what_runs_once(hlo_text):
    found = examine(planned(), CompilerResult(MEMORY, hlo_text, "", 7.0), V5P)
    assert found.estimate is not None and found.roofline is not None and found.memory is not None
    assert found.estimate.compiler_seconds == pytest.approx((32 * 100 + 1000 + 50 / 64) / 1.75e9)
    assert found.estimate.kernel_seconds == pytest.approx(0.25e-3)
    assert found.roofline.hbm_seconds == pytest.approx(1e-3)
    assert found.roofline.compute_seconds == pytest.approx(0.25e-3)
    assert (found.memory.peak, found.compile_seconds, found.num_chips) == (145, 7.0, 4)
    assert found.ratio == pytest.approx(found.estimate.seconds / 1e-3)


def test_waiting_time_includes_latency_and_excludes_transfers_that_only_start(hlo_text):
    found = examine(planned(), CompilerResult(MEMORY, hlo_text, "", 7.0), V5P)
    assert found.estimate is not None
    received = 32 * 8 * 128 * 2 * 2 * 3 / 4 + 16 * 4 * 3 / 4
    assert found.estimate.waited_seconds == pytest.approx(received / (2 * 100e9) + 33 * 2 * HOP_SECONDS)
    # The transfer that only starts is before the loop, so it is not part of the loop's traffic.
    assert [each.kind for each in found.traffic] == ["all-reduce", "all-gather"]


def test_a_program_that_did_not_compile_or_was_not_compiled_has_no_figures():
    refused = examine(planned(), CompilerResult({}, "", "RuntimeError: too large", 1.0), V5P)
    assert (refused.error, refused.memory, refused.ratio) == ("RuntimeError: too large", None, 0.0)
    assert examine(planned(), None, V5P).memory is None
