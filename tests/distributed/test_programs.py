"""Programs are compiled ahead of time, named and kept. Once strays are forbidden, only they can use a device."""

import importlib.util
import os
import pathlib
import subprocess
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from simpo_pipeline.distributed.mesh import global_mesh, hosts_mesh, local_mesh, training_mesh
from simpo_pipeline.distributed.programs import Programs, allow_strays, first_difference, forbid_strays, lower_program
from simpo_pipeline.errors import ConfigError

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


KERNEL = """
import jax
from jax.experimental import pallas


def double(x_ref, out_ref):
    out_ref[...] = x_ref[...] * 2


def run(x):
    return pallas.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
"""


def test_a_kernel_is_the_same_program_at_any_file_path(tmp_path):
    texts = []
    for folder in ("here", "elsewhere"):
        path = tmp_path / folder / "kernel.py"
        path.parent.mkdir()
        path.write_text(KERNEL)
        spec = importlib.util.spec_from_file_location("kernel", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        lower_program("any", lambda x: x, VECTOR)  # configures the file names in the program text
        traced = jax.jit(module.run).trace(jax.ShapeDtypeStruct((8, 128), np.float32))
        texts.append(traced.lower(lowering_platforms=("tpu",)).as_text())
    assert "tpu_custom_call" in texts[0]
    assert texts[0] == texts[1]


def test_device_order_is_part_of_the_fingerprint_although_the_text_omits_it(python):
    script = pathlib.Path(__file__).with_name("two_device_orders.py")
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run([*python, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]


def test_a_donated_argument_is_deleted_after_the_launch():
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


def test_the_compiler_reports_the_memory_of_a_program():
    memory = Programs().compile("double", lambda x: x + x, VECTOR).memory_bytes
    assert memory.arguments == memory.outputs == 16
    assert memory.peak >= 32


def test_the_meshes_cover_all_devices_and_this_process_devices():
    assert training_mesh().axis_names == ("data", "model")
    assert list(training_mesh().devices.flat) == jax.devices()
    assert list(local_mesh().devices.flat) == jax.local_devices()
    assert list(global_mesh().devices.flat) == jax.devices()
    assert hosts_mesh(jax.devices(), jax.local_devices()).devices.tolist() == [jax.local_devices()]


def devices_of(*process_indices: int):
    return [SimpleNamespace(process_index=process, id=number) for number, process in enumerate(process_indices)]


def test_hosts_with_different_device_layouts_are_refused():
    unequal = devices_of(0, 0, 1)
    with pytest.raises(ConfigError, match=r"the processes have \[2, 1\] devices; every process needs the same number"):
        hosts_mesh(unequal, unequal[:2])
    equal = devices_of(0, 0, 1, 1)
    with pytest.raises(ConfigError, match=r"the engine's devices are .* the devices of their process, ordered by id"):
        hosts_mesh(equal, equal[:1:-1])


def test_the_first_differing_line_of_two_programs_is_reported():
    ours = {"jax": "1", "XLA_FLAGS": "", "StableHLO": "a\nb\nc"}
    assert first_difference(ours, {**ours, "XLA_FLAGS": "--x"}).startswith(
        "XLA_FLAGS differs at line 1, '' in process 0"
    )
    assert first_difference(ours, {**ours, "StableHLO": "a\nB\nC"}) == (
        "StableHLO differs at line 2, 'b' in process 0 and 'B' there"
    )
    assert "'c' in process 0 and 'nothing' there" in first_difference(ours, {**ours, "StableHLO": "a\nb"})
