"""The handoff on two real processes: entirely on device, exact, and in bounded memory. See many_hosts.py."""

import json
import pathlib
import shutil

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return the folder of the compilation caches of both processes."""
    return tmp_path_factory.mktemp("cache")


def run(launch, cache: pathlib.Path) -> list[dict]:
    job = launch(2, "tests/handoff/many_hosts.py", cache).require_success()
    lines = [line for host in (0, 1) for line in job.lines(host) if line.startswith("FOUND ")]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


@pytest.fixture(scope="module")
def found(launch, cache) -> list[dict]:
    """Return the report of each process."""
    return run(launch, cache)


def test_each_host_gets_the_whole_model_cast_exactly_and_the_trainer_keeps_its_own(found):
    assert len(found) == 2
    for process in found:
        # No array went through numpy, otherwise the process would have failed.
        assert process["cast_exactly"] and process["fully_addressable"] and process["trainer_untouched"]
    assert found[0]["weights"] == found[1]["weights"]


def test_memory_stays_below_trainer_plus_one_copy_plus_a_tenth(found):
    for process in found:
        trainer, copy = process["trainer_bytes"], process["copy_bytes"]
        assert process["extra_resident_bytes"] < copy + 0.1 * (trainer + copy)
        # The compiler's own figures per device, with two devices per process.
        program = process["program_bytes_per_device"]
        assert trainer / 2 + program["outputs"] + program["temporary"] < 1.1 * (trainer + copy) / 2
        print({name: process[name] for name in ("trainer_bytes", "copy_bytes", "extra_resident_bytes")}, program)


def test_one_engine_over_all_devices_gets_its_weights_the_same_way(found):
    for process in found:
        everywhere, trainer = process["global"], process["trainer_bytes"] / 2
        assert everywhere["cast_exactly"]
        copy = everywhere["copy_bytes_per_device"]
        assert trainer + copy + everywhere["temporary_bytes_per_device"] < 1.1 * (trainer + copy)


def test_shards_are_exchanged_within_hosts_and_gathered_across_hosts_without_sums(found):
    for process in found:
        collectives = process["collectives"]
        assert collectives["all-reduce"] == 0
        # One exchange for each of the 7 stacks of matrices and the embedding, for any number of layers.
        assert collectives["all-to-all"] == 8
        assert collectives["all-gather"] >= 8


def test_a_host_that_has_lost_its_cache_gets_the_same_weights(launch, cache, found):
    """If one process loaded the program and the other compiled it, the order of its collectives would differ."""
    assert list((cache / "1").glob("*-cache"))
    shutil.rmtree(cache / "1")
    assert [process["weights"] for process in run(launch, cache)] == [process["weights"] for process in found]
