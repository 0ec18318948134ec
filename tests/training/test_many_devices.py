"""The same run on one device and on many (FSDP, tensor parallel, gradient accumulation) gives equal results."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(python, unoptimised, tiny_model) -> dict:
    script = Path(__file__).with_name("many_devices.py")
    env = os.environ | unoptimised | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    command = [*python, str(script), json.dumps(dataclasses.asdict(tiny_model))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_row_layouts_accumulation_remat_and_meshes_change_no_loss(found):
    assert len(found["curves"]) == 8 + 7
    for name, curve in found["curves"].items():
        for one, other in zip(found["one"], curve, strict=True):
            for metric in ("loss", "grad_norm", "rewards/chosen", "rewards/accuracies", "logps/rejected"):
                assert other[metric] == pytest.approx(one[metric], rel=1e-5), f"{metric} of {name}"
    assert found["largest_weight_difference"] < 1e-4


def test_each_device_has_its_shard_of_the_weights(found):
    assert found["embedding_per_device"] == {"(4, 1)": [40, 4], "(2, 2)": [20, 8]}


def test_interleaving_changes_nothing_on_four_devices(found):
    first, second = found["digests"]
    assert first == second


def test_a_batch_that_cannot_be_sharded_is_refused(found):
    assert found["refusal"].startswith("train_batch_size is 6 pairs, but the mesh has 4 devices on its axis 'data'")
