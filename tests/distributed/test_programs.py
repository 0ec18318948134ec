"""Programs are compiled ahead, named, kept, and the only way to a device once strays are forbidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from simpo_pipeline.distributed.mesh import local_mesh, training_mesh
from simpo_pipeline.distributed.programs import Programs, allow_strays, forbid_strays

VECTOR = jax.ShapeDtypeStruct((4,), np.float32)


def test_a_program_computes_and_its_launch_is_recorded():
    programs = Programs()
    double = programs.compile("double", lambda x: x + x, VECTOR)
    np.testing.assert_array_equal(np.asarray(double(np.arange(4, dtype=np.float32))), [0, 2, 4, 6])
    (launch,) = programs.ledger.launches
    assert (launch.program, launch.fingerprint, launch.num_devices) == ("double", double.fingerprint, 1)


def test_the_same_text_under_the_same_name_is_compiled_once():
    programs = Programs()
    first = programs.compile("add_one", lambda x: x + 1.0, VECTOR)
    assert programs.compile("add_one", lambda x: x + 1.0, VECTOR) is first
    assert programs.compile("add_one", lambda x: x + 2.0, VECTOR) is not first


def test_a_constant_a_shape_and_a_device_set_all_change_the_fingerprint():
    programs = Programs()
    on_mesh = jax.ShapeDtypeStruct((4,), np.float32, sharding=NamedSharding(training_mesh(), PartitionSpec()))
    prints = {
        programs.compile("scale", lambda x: x * 2.0, VECTOR).fingerprint,
        programs.compile("scale", lambda x: x * 3.0, VECTOR).fingerprint,
        programs.compile("scale", lambda x: x * 2.0, jax.ShapeDtypeStruct((8,), np.float32)).fingerprint,
        programs.compile("scale", lambda x: x * 2.0, on_mesh).fingerprint,
    }
    assert len(prints) == 4


def test_a_donated_argument_is_dead_after_the_launch():
    programs = Programs()
    bump = programs.compile("bump", lambda x: x + 1.0, VECTOR, donate_argnums=(0,))
    x = jax.device_put(np.zeros(4, np.float32))
    bump(x)
    assert x.is_deleted()


def test_strays_raise_and_programs_still_run():
    programs = Programs()
    double = programs.compile("double", lambda x: x + x, VECTOR)
    x = jax.device_put(np.ones(4, np.float32))
    forbid_strays()
    try:
        with pytest.raises(RuntimeError, match="tried to execute"):
            jnp.sin(x)
        np.testing.assert_array_equal(np.asarray(double(x)), [2, 2, 2, 2])
    finally:
        allow_strays()


def test_the_compiler_states_the_memory_of_a_program():
    memory = Programs().compile("double", lambda x: x + x, VECTOR).memory_bytes
    assert memory.arguments == memory.outputs == 16
    assert memory.peak >= 32


def test_the_meshes_cover_all_devices_and_this_process_devices():
    assert training_mesh().axis_names == ("data", "model")
    assert list(training_mesh().devices.flat) == jax.devices()
    assert list(local_mesh().devices.flat) == jax.local_devices()
