"""The report of made-up figures and its verdict, and the cache that figures come from."""

import dataclasses
import json

import pytest

from simpo_pipeline.preflight.cache import ResultCache
from simpo_pipeline.preflight.collectives import Traffic
from simpo_pipeline.preflight.examine import Estimate, ProgramFigures
from simpo_pipeline.preflight.memory import ProgramMemory, phase
from simpo_pipeline.preflight.report import Report, as_json, as_text
from simpo_pipeline.preflight.roofline import ProgramWork, Roofline
from simpo_pipeline.preflight.topology import TOPOLOGIES

GB = 10**9
MEMORY = ProgramMemory(arguments=6 * GB, outputs=6 * GB, aliased=5 * GB, temporary=30 * GB, code=GB)


def examined(name: str = "train_step", **changes) -> ProgramFigures:
    fields = {
        "name": name,
        "host": None,
        "num_chips": 16,
        "turns": 1,
        "stablehlo": "a" * 64,
        "compile_seconds": 100.0,
        "work": ProgramWork(3e16, 1e16),
        "memory": MEMORY,
        "traffic": (Traffic("all-gather", "bf16", 64, GB, 0.9 * GB, 10**7, "bf16[10,20]"),),
        "roofline": Roofline(9.0, 0.2, 0.1),
        "estimate": Estimate(10.0, 0.5, 0.3),
    }
    return ProgramFigures(**(fields | changes))


def report_of(*programs: ProgramFigures, phases=()) -> Report:
    return Report(TOPOLOGIES["v5p-32"], programs, phases, {"prompts": "are short"}, {"jax": "1", "libtpu": "2"})


def test_arguments_that_become_outputs_are_counted_once():
    assert MEMORY.peak == 38 * GB


def test_a_phase_needs_its_live_arrays_and_its_largest_program():
    found = phase("generate", {"trainer": 6 * GB}, {"small": ProgramMemory(1, 1, 1, 1, 0), "large": MEMORY}, 3 * GB)
    assert (found.program, found.total) == ("large", (38 + 6 + 2) * GB)


def test_a_job_that_fits_is_reported_with_all_figures():
    report = report_of(examined(), phases=[phase("train", {}, {"train_step": MEMORY}, GB)])
    text = as_text(report)
    assert "38.00 GB of 95.00 GB: arguments 6.00 GB, outputs 6.00 GB (5.00 GB aliased to arguments)" in text
    assert "all-gather         bf16      64 x, 0.90 GB received per chip" in text
    assert "roofline     9.00 s: compute 9.00 s, HBM 200.000 ms, links 100.000 ms" in text
    assert "estimate     10.80 s, 1.20 x" in text
    assert text.splitlines()[-1] == "Verdict: every program compiles for v5p-32, and the whole job fits in memory."


def test_the_json_has_the_same_figures_and_is_serializable():
    written = json.loads(json.dumps(as_json(report_of(examined()))))
    assert written["fits"] and not written["failures"]
    (program,) = written["programs"]
    assert program["peak_bytes"] == 38 * GB
    assert program["estimate_over_roofline"] == pytest.approx(1.2)
    assert written["topology"]["chip"]["source"].startswith("docs.cloud.google.com/tpu/docs/v5p")


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (
            report_of(examined(error="XlaRuntimeError: RESOURCE_EXHAUSTED\nmore", memory=None, host=2)),
            "train_step on host 2 does not compile: XlaRuntimeError: RESOURCE_EXHAUSTED",
        ),
        (
            report_of(examined(host=0), examined(host=1, stablehlo="b" * 64)),
            "train_step is not the same program on all hosts",
        ),
        (
            report_of(examined(), phases=[phase("train", {"much": 60 * GB}, {"train_step": MEMORY}, GB)]),
            "'train' needs 98.00 GB per chip, but a chip has 95.00 GB",
        ),
        (
            dataclasses.replace(report_of(examined()), refusals=["the engine needs 9 GiB"]),
            "the engine needs 9 GiB",
        ),
    ],
    ids=["does not compile", "differs between hosts", "does not fit", "refused"],
)
def test_a_job_that_cannot_run_is_reported_with_the_reason(report, reason):
    assert report.failures == [reason]
    assert as_text(report).endswith(f"Verdict: this job cannot run on v5p-32.\n  {reason}")
    assert not as_json(report)["fits"]


def test_a_program_on_every_host_is_shown_once_with_the_figures_of_the_slowest():
    slow = examined(host=1, estimate=Estimate(20.0, 0.0, 0.0))
    only_lowered = examined(host=2, memory=None, roofline=None, estimate=None)
    text = as_text(report_of(examined(host=0), slow, only_lowered))
    head = "train_step (16 chips, on each of 3 hosts, compiled for 0 and 1), StableHLO aaaaaaaaaaaa on all"
    assert text.count(head) == 1
    assert "estimate     20.00 s" in text


def test_results_are_cached_by_fingerprint_topology_and_compiler(tmp_path):
    cache = ResultCache(tmp_path, "v5p-32", "1.0")
    assert cache.read("f") is None
    cache.write("f", {"hlo": "text", "seconds": 1.5})
    assert ResultCache(tmp_path, "v5p-32", "1.0").read("f") == {"hlo": "text", "seconds": 1.5}
    for other in (ResultCache(tmp_path, "v5p-64", "1.0"), ResultCache(tmp_path, "v5p-32", "1.1")):
        assert other.read("f") is None


def test_an_incomplete_result_is_requested_again(tmp_path):
    cache = ResultCache(tmp_path, "v5p-32", "1.0")
    cache.write("f", {"hlo": "text"})
    (path,) = tmp_path.rglob("f.json.gz")
    path.write_bytes(path.read_bytes()[:20])
    assert cache.read("f") is None
