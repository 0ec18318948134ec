"""Where each named axis of a parameter lies on the mesh.

The forward pass never mentions a mesh; placement is these rules, applied to an abstract tree. Knows nothing of
which device belongs to which process.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

import haliax as hax
import jax
from haliax import NamedArray
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# Name of a parameter axis -> name of the mesh axis it is split over.
ShardingRules = Mapping[str, str]

# Training: every matrix is split along its "embed" axis, so each device holds 1/n of the master weights.
FSDP_RULES: ShardingRules = MappingProxyType({"embed": "data"})

# Generation: whole heads, slices of the MLP and of the vocabulary per device; "embed" stays whole.
TENSOR_PARALLEL_RULES: ShardingRules = MappingProxyType(
    {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model"}
)

Tree = TypeVar("Tree")


def with_shardings(tree: Tree, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> Tree:
    """The same tree of abstract NamedArrays, each `jax.ShapeDtypeStruct` with its `NamedSharding` on `mesh`.

    An axis without a rule is replicated, and so is one whose size the mesh axis does not divide (a model with 3
    key/value heads on 4 devices keeps all of them on each device). Leaves that are not NamedArrays are replicated.
    """

    def place(leaf: NamedArray | jax.ShapeDtypeStruct) -> NamedArray | jax.ShapeDtypeStruct:
        if isinstance(leaf, NamedArray):
            spec = partition_spec(leaf, mesh, rules)
            return NamedArray(_placed(leaf.array, NamedSharding(mesh, spec)), leaf.axes)  # pyright: ignore[reportArgumentType]
        return _placed(leaf, NamedSharding(mesh, PartitionSpec()))

    return hax.tree_util.tree_map(place, tree)


def partition_spec(leaf: NamedArray, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> PartitionSpec:
    """The mesh axis of each axis of `leaf`, None where it is replicated; a mesh axis is used once, by the first."""
    used: set[str] = set()
    spec: list[str | None] = []
    for axis in leaf.axes:
        mesh_axis = rules.get(axis.name)
        if mesh_axis is None or mesh_axis in used or axis.size % mesh.shape[mesh_axis]:
            spec.append(None)
        else:
            used.add(mesh_axis)
            spec.append(mesh_axis)
    return PartitionSpec(*spec)


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
