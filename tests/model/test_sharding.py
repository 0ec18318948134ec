"""Sharding rules on abstract meshes, and the FSDP forward and backward passes on four virtual devices."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from haliax import Axis, NamedArray
from jax.sharding import AbstractMesh, PartitionSpec

from simpo_pipeline.model.sharding import (
    TENSOR_PARALLEL_RULES,
    TRAINING_RULES,
    fsdp_placement,
    partition_spec,
    with_shardings,
)
from simpo_pipeline.model.transformer import ANYWHERE, abstract_llama

DATA_4 = AbstractMesh((4, 1), ("data", "model"))
MODEL_2, MODEL_4 = AbstractMesh((2,), ("model",)), AbstractMesh((4,), ("model",))


def _specs(config, mesh, rules):
    tree = with_shardings(abstract_llama(config, jnp.bfloat16), mesh, rules)
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, NamedArray))
    return {jax.tree_util.keystr(path[-1:]).lstrip("."): leaf.array.sharding.spec for path, leaf in paths}


def test_training_shards_every_parameter_along_embed(small_config):
    specs = _specs(small_config, DATA_4, TRAINING_RULES)
    assert specs["wq"] == PartitionSpec(None, "model", None, "data")
    assert specs["wo"] == PartitionSpec(None, "data", "model", None)
    assert specs["embedding"] == PartitionSpec("model", "data")
    assert all("data" in spec for spec in specs.values())


def test_generation_shards_heads_mlp_and_vocabulary_and_replicates_norms(small_config):
    assert _specs(small_config, MODEL_2, TENSOR_PARALLEL_RULES) == {
        "embedding": PartitionSpec("model", None),
        "head": PartitionSpec("model", None),
        "final_norm": PartitionSpec(None),
        "attn_norm": PartitionSpec(None, None),
        "mlp_norm": PartitionSpec(None, None),
        "wq": PartitionSpec(None, "model", None, None),
        "wk": PartitionSpec(None, "model", None, None),
        "wv": PartitionSpec(None, "model", None, None),
        "wo": PartitionSpec(None, None, "model", None),
        "w_gate": PartitionSpec(None, "model", None),
        "w_up": PartitionSpec(None, "model", None),
        "w_down": PartitionSpec(None, None, "model"),
    }


def test_an_axis_that_does_not_divide_is_replicated(small_config):
    # 6 heads and 2 key/value heads on 4 devices.
    specs = _specs(small_config, MODEL_4, TENSOR_PARALLEL_RULES)
    assert specs["wq"] == specs["wk"] == PartitionSpec(None, None, None, None)
    assert specs["w_gate"] == PartitionSpec(None, "model", None)


def test_a_mesh_axis_is_used_once_in_an_array():
    leaf = NamedArray(jax.ShapeDtypeStruct((4, 8), jnp.float32), (Axis("heads", 4), Axis("mlp", 8)))  # pyright: ignore[reportArgumentType]
    assert partition_spec(leaf, MODEL_4, TENSOR_PARALLEL_RULES) == PartitionSpec("model", None)


def test_shapes_and_dtypes_do_not_change(small_config):
    before = abstract_llama(small_config, jnp.bfloat16)
    after = with_shardings(before, DATA_4, TRAINING_RULES)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(before)] == [(x.shape, x.dtype) for x in jax.tree.leaves(after)]


def test_on_one_device_placement_does_nothing():
    assert fsdp_placement(jax.make_mesh((1, 1), ("data", "model")), jnp.bfloat16) == ANYWHERE


@pytest.fixture(scope="module")
def four_devices(small_config, python) -> dict:
    """Return the results of `four_device_gradient.py` on four virtual CPU devices."""
    config = dataclasses.replace(small_config, tie_word_embeddings=True)
    done = subprocess.run(
        [*python, str(Path(__file__).with_name("four_device_gradient.py")), json.dumps(config.to_hf())],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_four_devices_compute_the_loss_and_gradient_of_one(four_devices):
    assert four_devices["loss_difference"] < 1e-6
    assert four_devices["relative_gradient_difference"] < 1e-5


def test_each_of_four_devices_keeps_a_quarter_of_the_parameters_and_of_the_gradient(four_devices):
    assert four_devices["parameter_bytes_per_device"] * 4 == four_devices["parameter_bytes"]
    assert four_devices["gradient_bytes_per_device"] * 4 == four_devices["parameter_bytes"]


def test_scattered_matmuls_equal_those_of_one_device_and_are_sharded(four_devices):
    matmuls = four_devices["products"]
    assert len(matmuls) == 14
    assert max(difference for difference, _ in matmuls.values()) < 2e-5
    specs = [spec for name, (_, spec) in matmuls.items() if "64, 8, 24" in name]
    assert len(specs) == 10 and all("data" in spec for spec in specs), matmuls


def test_hidden_states_are_sharded_over_sequences_and_never_summed_over_devices(four_devices):
    # [8 sequences, 16 positions, 24] is sharded, 2 sequences per device; the whole array must occur nowhere.
    assert "f32[2,16,24]" in four_devices["shapes"]
    assert "f32[8,16,24]" not in four_devices["shapes"]
