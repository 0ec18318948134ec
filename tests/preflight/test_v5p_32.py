"""The reference M11 compiled for a v5p-32: its memory and estimated cost must not increase.

    uv run --isolated --extra tpu pytest -m slow tests/preflight/test_v5p_32.py

It compiles for minutes on an idle machine, unless the same programs were compiled before (`preflight.cache`). The
limits are the figures of benchmarks/RESULTS.md plus 5%.
"""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("libtpu", reason="the compiler for TPUs is not installed: it comes with the extra `tpu`")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

ROOT = pathlib.Path(__file__).resolve().parents[2]
GB = 10**9
# The gradient of the smallest matrix of a layer, that of keys or of values, in float32.
SMALLEST_GRADIENT_BYTES = 1024 * 4096 * 4
# In the dtype in which it is transferred; the hidden states of a batch are 8.6 GB.
EMBEDDING_BYTES = 128256 * 4096 * 2
# 1,088 pages of 128 tokens, keys and values of 2 heads of 128 on each chip, in bfloat16.
CACHE_OF_A_LAYER_BYTES = 1088 * 128 * 2 * 2 * 128 * 2
LAYERS = 32
MOST_BYTES = {"start": 7 * GB, "train": 54 * GB, "hand over": 11 * GB, "empty cache": 16 * GB, "generate": 17 * GB}
# Limits that hold for every change.
MOST_RATIO = {"train_step": 1.3, "engine_decode_32": 2.5}
EXPECTED_RATIO = {"train_step": 1.29, "engine_decode_32": 2.49}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("preflight")
    script = [sys.executable, str(ROOT / "experiments" / "m11_interleave.py"), "--preset", "llama3_8b_v5p_32"]
    done = subprocess.run(
        [*script, "--preflight", "v5p-32", "--prefix", str(prefix)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((prefix / "preflight-v5p-32.json").read_text())


def compiled(report, name: str) -> list[dict]:
    found = [program for program in report["programs"] if program["name"] == name and program["memory"]]
    assert found, name
    return found


def test_the_whole_job_fits_with_the_trainer_resident(report):
    assert report["fits"] and not report["failures"]
    totals = {phase["name"]: phase["total_bytes"] for phase in report["phases"]}
    assert set(totals) == set(MOST_BYTES)
    assert not {name: total for name, total in totals.items() if total > MOST_BYTES[name]}
    (generate,) = (phase for phase in report["phases"] if phase["name"] == "generate")
    assert generate["beside"]["trainer"] > 6 * GB


def test_every_host_has_the_same_programs(report):
    by_name: dict[str, set[str]] = {}
    for program in report["programs"]:
        by_name.setdefault(program["name"], set()).add(program["stablehlo"])
    assert {name: len(prints) for name, prints in by_name.items()} == dict.fromkeys(by_name, 1)
    hosts = {program["host"] for program in report["programs"] if program["name"] == "engine_decode_32"}
    assert hosts == {0, 1, 2, 3}


def test_no_weight_gradient_is_all_reduced_in_full(report):
    (train,) = compiled(report, "train_step")
    reduced = [each for each in train["traffic"] if each["kind"] == "all-reduce"]
    assert all(each["largest_bytes"] < SMALLEST_GRADIENT_BYTES for each in reduced), reduced


def test_an_update_gathers_weights_and_no_hidden_states(report):
    (train,) = compiled(report, "train_step")
    gathered = [each for each in train["traffic"] if each["kind"] == "all-gather"]
    assert all(each["largest_bytes"] <= EMBEDDING_BYTES for each in gathered), gathered


def test_the_handoff_transfers_only_bfloat16(report):
    (handoff,) = compiled(report, "handoff")
    assert {each["dtype"] for each in handoff["traffic"]} == {"bf16"}


def test_the_cache_is_updated_in_place(report):
    for name in ("engine_decode_32", "engine_prefill_4096", "engine_prefill_4096_decode_32", "engine_copy_pages"):
        for program in compiled(report, name):
            assert program["memory"]["aliased"] >= LAYERS * CACHE_OF_A_LAYER_BYTES
            assert program["largest_copy_bytes"] < CACHE_OF_A_LAYER_BYTES
            assert program["memory"]["temporary"] < LAYERS * CACHE_OF_A_LAYER_BYTES // 2


@pytest.mark.parametrize("name", ["train_step", "engine_decode_32"])
def test_the_estimate_over_the_roofline_does_not_get_worse(report, name):
    for program in compiled(report, name):
        assert program["estimate_over_roofline"] <= min(1.05 * EXPECTED_RATIO[name], MOST_RATIO[name])
