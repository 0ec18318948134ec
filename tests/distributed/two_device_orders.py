"""Lower one function over two devices in both orders. Print whether the texts and the fingerprints are equal.

JAX_NUM_CPU_DEVICES=2 python tests/distributed/two_device_orders.py
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simpo_pipeline.distributed.programs import LoweredProgram, lower_program


def double(x: jax.Array) -> jax.Array:
    """Return `x + x`."""
    return x + x


def lowered(devices: Sequence[Any]) -> LoweredProgram:
    """Lower `double` over the devices."""
    sharding = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    return lower_program("double", double, jax.ShapeDtypeStruct((4,), np.float32, sharding=sharding))


if __name__ == "__main__":
    one, other = lowered(jax.devices()), lowered(jax.devices()[::-1])
    print(one.stablehlo_fingerprint == other.stablehlo_fingerprint, one.fingerprint == other.fingerprint)
