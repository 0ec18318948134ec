"""A process detects its job from the environment, and incomplete settings are an error that names what is missing."""

import pathlib

import pytest

from simpo_pipeline.distributed.config import Membership, WatchConfig, find_membership
from simpo_pipeline.errors import ConfigError

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def test_a_process_without_a_job_in_its_environment_is_alone(tmp_path):
    assert find_membership({}, tmp_path) is None


def test_explicit_settings_name_the_job(tmp_path):
    assert find_membership(EXPLICIT, tmp_path) == Membership("10.0.0.1:8476", 4, 3)


def test_jax_detects_the_job_on_a_gke_slice_and_a_tpu_vm(tmp_path):
    assert find_membership({"TPU_WORKER_HOSTNAMES": "a,b"}, tmp_path) == Membership()
    assert find_membership({"TPU_WORKER_HOSTNAMES": "a"}, tmp_path) is None
    assert find_membership({"MEGASCALE_COORDINATOR_ADDRESS": "a:8080"}, tmp_path) == Membership()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "accel0").touch()
    assert find_membership({}, tmp_path, lambda: True) == Membership()
    # Without the TPU library, the device file belongs to another card. A job on CPU ignores device files.
    assert find_membership({}, tmp_path, lambda: False) is None
    assert find_membership({"JAX_PLATFORMS": "cpu"}, tmp_path, lambda: True) is None


def test_explicit_settings_win_over_a_tpu(tmp_path: pathlib.Path):
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "0").touch()
    assert find_membership(EXPLICIT, tmp_path, lambda: True) == Membership("10.0.0.1:8476", 4, 3)


def test_a_silence_longer_than_jax_waits_for_is_refused():
    with pytest.raises(ConfigError, match=r"watch\.silence_seconds is 20\.0; it must be at most 18\.0"):
        WatchConfig(silence_seconds=20.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "sets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES but not JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_NUM_PROCESSES is '4' and JAX_PROCESS_ID '4'"),
        ({"JAX_NUM_PROCESSES": "many"}, "JAX_NUM_PROCESSES is 'many'"),
        ({"JAX_COORDINATOR_ADDRESS": "somewhere"}, "it must be HOST:PORT"),
    ],
)
def test_incomplete_or_wrong_settings_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        find_membership({**EXPLICIT, **changes}, tmp_path)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_watch_limit_that_is_not_positive_and_finite_is_refused(seconds):
    with pytest.raises(ConfigError, match=r"watch\.grace_seconds must be a finite number of seconds above 0"):
        WatchConfig(grace_seconds=seconds)
