"""The two meshes of a job: one over all devices for training, one over this process's devices for generation.

Meshes are passed as arguments and never made ambient: under `jax.set_mesh`, an innocent `jnp.zeros(())` on one host
runs on every device of the mesh, which is how one host comes to launch a program that its peers do not.
"""

import jax
import numpy as np
from jax.sharding import Mesh

DATA_AXIS = "data"
MODEL_AXIS = "model"


def training_mesh() -> Mesh:
    """A mesh `(data, model)` over every device of the job, all of them on `data`.

    Devices are ordered by process, so that each process holds one contiguous block of the `data` axis.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices).reshape(len(devices), 1), (DATA_AXIS, MODEL_AXIS))


def local_mesh() -> Mesh:
    """A mesh `(model,)` over the devices of this process, in the order in which jax lists them."""
    return Mesh(np.array(jax.local_devices()), (MODEL_AXIS,))
