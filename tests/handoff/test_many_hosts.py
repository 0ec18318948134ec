"""The handoff on two real processes: on device all the way, exact, and in bounded memory. See many_hosts.py."""

import json
import pathlib
import shutil

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The compilation caches of both processes."""
    return tmp_path_factory.mktemp("cache")


def run(launch, cache: pathlib.Path) -> list[dict]:
    job = launch(2, "tests/handoff/many_hosts.py", cache).require_success()
    lines = [line for host in (0, 1) for line in job.lines(host) if line.startswith("FOUND ")]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


@pytest.fixture(scope="module")
def found(launch, cache) -> list[dict]:
    """The report of each process."""
    return run(launch, cache)


def test_each_host_gets_the_whole_model_cast_exactly_and_the_trainer_keeps_its_own(found):
    assert len(found) == 2
    for process in found:
        # No array went through numpy, or the process would have failed.
        assert process["cast_exactly"] and process["fully_addressable"] and process["trainer_untouched"]
    assert found[0]["weights"] == found[1]["weights"]


def test_memory_stays_below_trainer_and_one_copy_and_a_tenth(found):
    for process in found:
        trainer, copy = process["trainer_bytes"], process["copy_bytes"]
        assert process["extra_resident_bytes"] < copy + 0.1 * (trainer + copy)
        # The compiler's own word, per device: two devices a process.
        program = process["program_bytes_per_device"]
        assert trainer / 2 + program["outputs"] + program["temporary"] < 1.1 * (trainer + copy) / 2
        print({name: process[name] for name in ("trainer_bytes", "copy_bytes", "extra_resident_bytes")}, program)


def test_one_engine_over_all_devices_gets_its_weights_the_same_way(found):
    for process in found:
        everywhere, trainer = process["global"], process["trainer_bytes"] / 2
        assert everywhere["cast_exactly"]
        copy = everywhere["copy_bytes_per_device"]
        assert trainer + copy + everywhere["temporary_bytes_per_device"] < 1.1 * (trainer + copy)


def test_parts_are_traded_within_hosts_and_gathered_over_hosts_and_nothing_is_summed(found):
    for process in found:
        collectives = process["collectives"]
        assert collectives["all-reduce"] == 0
        # One trade for each of the 7 stacks of matrices and the embedding, whatever the number of layers.
        assert collectives["all-to-all"] == 8
        assert collectives["all-gather"] >= 8


def test_a_host_that_has_lost_its_cache_gets_the_same_weights(launch, cache, found):
    """Loaded in one process and compiled in the other, the program's collectives would meet in another order."""
    assert list((cache / "1").glob("*-cache"))
    shutil.rmtree(cache / "1")
    assert [process["weights"] for process in run(launch, cache)] == [process["weights"] for process in found]
