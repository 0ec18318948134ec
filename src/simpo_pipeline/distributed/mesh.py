"""The meshes of a job: over all devices for training, over one process's or over all for generation.

Meshes are passed as arguments and never made ambient: under `jax.set_mesh`, an innocent `jnp.zeros(())` on one host
runs on every device of the mesh, which is how one host comes to launch a program that its peers do not.

All meshes over all devices list them in one order, by process and then by id, so that arrays can go from one to
another in one program, and each process holds one contiguous block.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from simpo_pipeline.errors import ConfigError

DATA_AXIS = "data"
MODEL_AXIS = "model"
HOST_AXIS = "host"


def training_mesh(tensor_parallel: int = 1) -> Mesh:
    """A mesh `(data, model)` over every device of the job, so many neighbours on `model`.

    Raises:
        ConfigError: the devices cannot be split so.
    """
    devices = _all_devices()
    if tensor_parallel < 1 or devices.size % tensor_parallel:
        raise ConfigError(
            f"tensor_parallel is {tensor_parallel} and the job has {devices.size} devices; give a divisor of that."
        )
    return Mesh(devices.reshape(-1, tensor_parallel), (DATA_AXIS, MODEL_AXIS))


def local_mesh() -> Mesh:
    """A mesh `(model,)` over the devices of this process, in the order in which jax lists them."""
    return Mesh(np.array(jax.local_devices()), (MODEL_AXIS,))


def global_mesh() -> Mesh:
    """A mesh `(model,)` over every device of the job."""
    return Mesh(_all_devices(), (MODEL_AXIS,))


def hosts_mesh() -> Mesh:
    """A mesh `(host, model)` over every device of the job, whose row of this process is its `local_mesh`.

    Raises:
        ConfigError: the processes have unequal numbers of devices.
    """
    devices = _all_devices()
    per_process = [sum(device.process_index == index for device in devices) for index in range(jax.process_count())]
    if len(set(per_process)) > 1:
        raise ConfigError(
            f"the processes have {per_process} devices; a job needs the same number in each, so that weights can be "
            "laid out alike on every host"
        )
    rows = devices.reshape(len(per_process), -1)
    own = list(rows[jax.process_index()])
    if own != jax.local_devices():
        raise ConfigError(
            f"jax lists the devices of this process as {jax.local_devices()}, not by id as {own}; weights could not "
            "be regrouped without a copy"
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


def _all_devices() -> np.ndarray:
    return np.array(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))
