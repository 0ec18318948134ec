"""The handoff casts and reshards on device, shares where it can, and leaves the trainer's buffers alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from simpo_pipeline.distributed.mesh import local_mesh, training_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.errors import ModelError
from simpo_pipeline.handoff.handoff import build_handoff

VALUES = np.linspace(-3, 3, 32, dtype=np.float32).reshape(4, 8)


def abstract(dtype, mesh, shape=(4, 8)):
    return {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))}


def params():
    return {"w": jax.device_put(VALUES, NamedSharding(training_mesh(), PartitionSpec()))}


def test_weights_of_another_dtype_are_a_cast_copy_and_the_parameters_are_kept():
    programs = Programs()
    handoff = build_handoff(programs, abstract(jnp.float32, training_mesh()), abstract(jnp.bfloat16, local_mesh()))
    held = params()
    weights = handoff(held)
    assert not weights.shared
    assert weights.num_bytes == VALUES.size * 2
    np.testing.assert_array_equal(np.asarray(weights.tree["w"]), VALUES.astype(jnp.bfloat16))
    weights.free()
    np.testing.assert_array_equal(np.asarray(held["w"]), VALUES)
    assert [launch.program for launch in programs.ledger.launches] == ["handoff"]


def test_parameters_that_fit_are_shared_without_a_program():
    programs = Programs()
    handoff = build_handoff(programs, abstract(jnp.float32, training_mesh()), abstract(jnp.float32, local_mesh()))
    held = params()
    weights = handoff(held)
    assert weights.shared
    assert weights.tree["w"] is held["w"]
    weights.free()
    np.testing.assert_array_equal(np.asarray(held["w"]), VALUES)
    assert programs.ledger.launches == ()


def test_a_copy_survives_the_donation_of_the_parameters():
    programs = Programs()
    source = abstract(jnp.float32, training_mesh())
    weights = build_handoff(programs, source, abstract(jnp.bfloat16, local_mesh()))(held := params())
    update = programs.compile("update", lambda p: {"w": p["w"] * 2.0}, source, donate_argnums=(0,))
    update(held)
    assert held["w"].is_deleted()
    np.testing.assert_array_equal(np.asarray(weights.tree["w"]), VALUES.astype(jnp.bfloat16))


def test_trees_that_differ_are_refused_by_name():
    source = abstract(jnp.float32, training_mesh())
    with pytest.raises(ModelError, match=r"\['w'\].*\(4, 8\).*\(8, 4\)"):
        build_handoff(Programs(), source, abstract(jnp.float32, local_mesh(), shape=(8, 4)))
    with pytest.raises(ModelError, match="equal trees"):
        build_handoff(Programs(), source, {"v": source["w"]})
