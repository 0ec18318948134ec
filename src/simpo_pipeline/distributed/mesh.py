"""The meshes of a job: over all devices for training, and over one process's devices or all devices for generation.

Meshes are passed as arguments and never set as the ambient mesh. Under `jax.set_mesh`, a harmless-looking
`jnp.zeros(())` on one host runs on every device of the mesh. That host then launches a program that its peers do not.

All meshes over all devices list the devices in the same order: by process, then by id. Arrays can therefore move from
one mesh to another within one program, and each process owns one contiguous block. A function that is given devices
does not query jax for them, so meshes can be built from the devices of a described topology.
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

# A jax device, or the description of one.
Device = Any


def training_mesh(tensor_parallel: int = 1, devices: Iterable[Device] | None = None) -> Mesh:
    """Return a mesh `(data, model)` over every device of the job, with `tensor_parallel` neighbors along `model`.

    Raises:
        ConfigError: `tensor_parallel` is not a positive divisor of the number of devices.
    """
    devices = _in_order(jax.devices() if devices is None else devices)
    if tensor_parallel < 1 or devices.size % tensor_parallel:
        raise ConfigError(
            f"tensor_parallel is {tensor_parallel} and the job has {devices.size} devices; set it to a divisor of that."
        )
    return Mesh(devices.reshape(-1, tensor_parallel), (DATA_AXIS, MODEL_AXIS))


def local_mesh(devices: Sequence[Device] | None = None) -> Mesh:
    """Return a mesh `(model,)` over this process's devices or the given devices of one process, in jax's order."""
    return Mesh(np.array(jax.local_devices() if devices is None else devices), (MODEL_AXIS,))


def global_mesh() -> Mesh:
    """Return a mesh `(model,)` over every device of the job."""
    return Mesh(_in_order(jax.devices()), (MODEL_AXIS,))


def hosts_mesh(devices: Iterable[Device], own: Sequence[Device]) -> Mesh:
    """Return a mesh `(host, model)` over the devices of the job, in which `own` is the row of its process.

    Raises:
        ConfigError: the processes have unequal numbers of devices, or `own` is not all devices of its process, ordered
            by id.
    """
    in_order = _in_order(devices)
    per_process = collections.Counter(device.process_index for device in in_order)
    if len(set(per_process.values())) > 1:
        raise ConfigError(
            f"the processes have {list(per_process.values())} devices; every process needs the same number, so that "
            "weights can have the same layout on every host"
        )
    rows = in_order.reshape(len(per_process), -1)
    (row,) = (list(row) for row in rows if row[0].process_index == own[0].process_index)
    if row != list(own):
        raise ConfigError(
            f"the engine's devices are {list(own)}, but the devices of their process, ordered by id, are {row}; the "
            "engine must use all of them in this order, because otherwise regrouping the weights would need a copy"
        )
    return Mesh(rows, (HOST_AXIS, MODEL_AXIS))


def place(arrays: Any, sharding: Sharding) -> Any:
    """Put a pytree of numpy arrays on the devices of `sharding` without launching a program.

    Every process passes the full arrays and fills its own devices. (`jax.device_put` to devices of other processes
    would launch a program that compares the arrays across the processes.)
    """
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)

    def put(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, arrays)


def _in_order(devices: Iterable[Device]) -> np.ndarray:
    return np.array(sorted(devices, key=lambda device: (device.process_index, device.id)))
