"""The meshes of a job: over all devices for training, over one process's or over all for generation.

Meshes are passed as arguments and never made ambient: under `jax.set_mesh`, an innocent `jnp.zeros(())` on one host
runs on every device of the mesh, which is how one host comes to launch a program that its peers do not.

All meshes over all devices list them in one order, by process and then by id, so that arrays can go from one to
another in one program, and each process holds one contiguous block. Where devices can be given, none is asked for, so
that meshes can be made of the devices of a described topology.
"""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from simpo_pipeline.errors import ConfigError

DATA_AXIS = "data"
MODEL_AXIS = "model"
HOST_AXIS = "host"

# A device of jax, or the description of one.
Device = Any


def training_mesh(tensor_parallel: int = 1, devices: Iterable[Device] | None = None) -> Mesh:
    """A mesh `(data, model)` over every device of the job, so many neighbours on `model`.

    Raises:
        ConfigError: the devices cannot be split so.
    """
    devices = _in_order(jax.devices() if devices is None else devices)
    if tensor_parallel < 1 or devices.size % tensor_parallel:
        raise ConfigError(
            f"tensor_parallel is {tensor_parallel} and the job has {devices.size} devices; give a divisor of that."
        )
    return Mesh(devices.reshape(-1, tensor_parallel), (DATA_AXIS, MODEL_AXIS))


def local_mesh(devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh `(model,)` over the devices of this process, or over those of one that are given, as jax lists them."""
    return Mesh(np.array(jax.local_devices() if devices is None else devices), (MODEL_AXIS,))


def global_mesh() -> Mesh:
    """A mesh `(model,)` over every device of the job."""
    return Mesh(_in_order(jax.devices()), (MODEL_AXIS,))


def hosts_mesh(devices: Iterable[Device], own: Sequence[Device]) -> Mesh:
    """A mesh `(host, model)` over the devices of the job, whose row of the process of the devices `own` is just these.

    Raises:
        ConfigError: the processes have unequal numbers of devices, or `own` is not all of a process's, ordered by id.
    """
    in_order = _in_order(devices)
    per_process = collections.Counter(device.process_index for device in in_order)
    if len(set(per_process.values())) > 1:
        raise ConfigError(
            f"the processes have {list(per_process.values())} devices; a job needs the same number in each, so that "
            "weights can be laid out alike on every host"
        )
    rows = in_order.reshape(len(per_process), -1)
    (row,) = (list(row) for row in rows if row[0].process_index == own[0].process_index)
    if row != list(own):
        raise ConfigError(
            f"the engine's devices are {list(own)}, and those of their process, by id, {row}; weights can be laid out "
            "on all devices of a process in this order, others could not be regrouped without a copy"
        )
    return Mesh(rows, (HOST_AXIS, MODEL_AXIS))


def place(arrays: Any, sharding: Sharding) -> Any:
    """Puts a pytree of numpy arrays on the devices of `sharding`; nothing is launched.

    Every process passes the whole arrays and fills its own devices. (`jax.device_put` to devices of other processes
    would launch a program that compares the arrays across them.)
    """
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)

    def put(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, arrays)


def _in_order(devices: Iterable[Device]) -> np.ndarray:
    return np.array(sorted(devices, key=lambda device: (device.process_index, device.id)))
