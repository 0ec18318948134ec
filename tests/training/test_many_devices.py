"""The same code on four devices, FSDP: the same numbers up to rounding, the same law."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> dict:
    script = Path(__file__).with_name("many_devices.py")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_four_devices_train_as_one_does(found):
    for one, four in zip(found["one"], found["four"], strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/accuracies", "logps/rejected"):
            assert four[name] == pytest.approx(one[name], rel=1e-5), name
    assert found["largest_weight_difference"] < 1e-4


def test_each_device_holds_its_share_of_the_weights(found):
    assert found["embed_per_device"] == [4]


def test_interleaving_changes_nothing_on_four_devices(found):
    first, second = found["digests"]
    assert first == second


def test_a_batch_that_the_devices_cannot_share_is_refused(found):
    assert found["refusal"].startswith("train_batch_size is 6 pairs and the mesh has 4 devices on its axis 'data'")
