"""Sharding of each named axis of a parameter over the mesh, at rest and during computation.

The forward pass never mentions a mesh. At rest, these rules applied to an abstract tree give the shardings. During
computation, the `Placement` passed to `transform` gives them. This module does not know which device belongs to which
process.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import haliax as hax
import jax
from haliax import Axis, NamedArray
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from simpo_pipeline.model.transformer import ANYWHERE, Attend, Placement, attend_whole_sequences
from simpo_pipeline.ops.attention_tpu import causal_attention_on
from simpo_pipeline.ops.linear import TransposedMatmul, scattered_matmul, transposed_matmul
from simpo_pipeline.ops.packed_attention import packed_attention_on

# Name of a parameter axis -> name of the mesh axis that it is sharded over.
ShardingRules = Mapping[str, str]

# Generation: each device has whole heads, and slices of the MLP and of the vocabulary. "embed" is not sharded.
TENSOR_PARALLEL_RULES: ShardingRules = MappingProxyType(
    {"heads": "model", "kv_heads": "model", "parts": "model", "mlp": "model", "vocab": "model"}
)

# Training: every matrix is also sharded along its "embed" axis, so each device stores 1/n of the master weights.
TRAINING_RULES: ShardingRules = MappingProxyType({**TENSOR_PARALLEL_RULES, "embed": "data"})

Tree = TypeVar("Tree")


def with_shardings(tree: Tree, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> Tree:
    """Return the tree of abstract NamedArrays with the `NamedSharding` on `mesh` of each `jax.ShapeDtypeStruct`.

    An axis without a rule is replicated. So is an axis whose size the mesh axis does not divide: a model with 3
    key/value heads on 4 devices keeps all of them on each device. Leaves that are not NamedArrays are replicated.
    """

    def place(leaf: NamedArray | jax.ShapeDtypeStruct) -> NamedArray | jax.ShapeDtypeStruct:
        if isinstance(leaf, NamedArray):
            spec = partition_spec(leaf, mesh, rules)
            return NamedArray(_with_sharding(leaf.array, NamedSharding(mesh, spec)), leaf.axes)  # pyright: ignore[reportArgumentType]
        return _with_sharding(leaf, NamedSharding(mesh, PartitionSpec()))

    return hax.tree_util.tree_map(place, tree)


def partition_spec(leaf: NamedArray, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> PartitionSpec:
    """Return the mesh axis of each axis of `leaf`, None if replicated.

    A mesh axis is used at most once, by the first axis of `leaf` that can use it.
    """
    return PartitionSpec(*_mesh_axes(leaf.axes, mesh, rules))


def fsdp_placement(mesh: Mesh, dtype: DTypeLike, slot_lens: tuple[int, ...] = ()) -> Placement:
    """Return the placement of fully sharded data parallelism (FSDP).

    Rows are sharded over the mesh axis "data", and weights are all-gathered along it layer by layer. Along the mesh
    axis "model" weights stay sharded, and each device computes its heads and its slice of the MLP.

    By default XLA would instead shard the sum over "embed", with every device computing every sequence. Matrices are
    cast to `dtype` before they are gathered. Gradients are summed over devices in their own dtype, and each device
    receives only its shard of the sum. On one device no array is resharded. Rows with slots of `slot_lens` attend slot
    by slot. Other rows use a kernel where one exists, which is on TPUs.
    """
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    row_major = _row_major if on_tpu else ANYWHERE.residual
    attend = _attend_on(mesh, slot_lens)
    if mesh.size == 1:
        return ANYWHERE._replace(residual=row_major, attend=attend, keeps_heads=on_tpu)

    def at(array: NamedArray, spec: PartitionSpec) -> NamedArray:
        return NamedArray(jax.lax.with_sharding_constraint(array.array, NamedSharding(mesh, spec)), array.axes)

    def gathered_by(rules: ShardingRules) -> Callable[[NamedArray], NamedArray]:
        @jax.custom_vjp
        def gather(weight: NamedArray) -> NamedArray:
            # Norm scales keep their dtype. Matrices are cast back afterwards, so that the backward pass does not round
            # their gradients; XLA removes the pair of casts.
            gather_dtype = dtype if weight.ndim > 1 else weight.dtype
            return at(weight.astype(gather_dtype), partition_spec(weight, mesh, rules)).astype(weight.dtype)

        def forward(weight: NamedArray) -> tuple[NamedArray, None]:
            return gather(weight), None

        def backward(_: None, gradient: NamedArray) -> tuple[NamedArray]:
            # The transpose of the gather's own constraint would require the whole sum on every device.
            return (at(gradient, partition_spec(gradient, mesh, TRAINING_RULES)),)

        gather.defvjp(forward, backward)
        return gather

    def scatter_gradient(out_axes: Sequence[Axis], in_axes: Sequence[Axis]) -> TransposedMatmul:
        mesh_axes = _mesh_axes((*out_axes, *in_axes), mesh, TRAINING_RULES)
        # Of several axes that form one axis of the matrix, only the first may be sharded.
        out_mesh_axis, in_mesh_axis = mesh_axes[0], mesh_axes[len(out_axes)]
        if "data" not in mesh_axes:
            return transposed_matmul
        scatters_in = in_mesh_axis == "data"
        other = out_mesh_axis if scatters_in else in_mesh_axis
        return scattered_matmul(mesh, ("data",), scatters_in=scatters_in, other_axis=other)

    # Slices of a table that is sharded over devices would be gathered chunk by chunk. Shard the tokens instead.
    by_token = NamedSharding(mesh, PartitionSpec(("data", "model")))
    return Placement(
        weight=gathered_by(TENSOR_PARALLEL_RULES),
        hidden=lambda hidden: at(hidden, PartitionSpec("data")),
        residual=lambda hidden: row_major(at(hidden, PartitionSpec("data"))),
        unembedding=gathered_by({}),
        predicting=lambda hidden: jax.lax.with_sharding_constraint(hidden, by_token),
        attend=attend,
        gradient=scatter_gradient,
        unembedding_gradient=scattered_matmul(mesh, ("data", "model"), scatters_in=True),
        keeps_heads=on_tpu,
    )


def _row_major(hidden: NamedArray) -> NamedArray:
    """Constrain the layout so that the elements of a token are contiguous.

    Otherwise XLA's TPU backend makes the elements of neighbouring tokens contiguous, and relayouts everything. Use this
    only within layers: elsewhere XLA gathers the constrained array on every device.
    """
    return NamedArray(with_layout_constraint(hidden.array, Layout(tuple(range(hidden.ndim)))), hidden.axes)


def _attend_on(mesh: Mesh, slot_lens: tuple[int, ...]) -> Attend:
    """Return the `Attend` of whole sequences on a mesh: rows sharded over "data" and heads over "model"."""
    if slot_lens:
        attention = packed_attention_on(mesh, "data", "model", slot_lens)
    elif mesh.devices.flat[0].platform == "tpu":
        attention = causal_attention_on(mesh, "data", "model")
    else:
        return attend_whole_sequences
    return lambda layer, q, k, v, state: (attention(q, k, v, state), state)


def _mesh_axes(axes: Sequence[Axis], mesh: Mesh | AbstractMesh, rules: ShardingRules) -> list[str | None]:
    used: set[str] = set()
    mesh_axes: list[str | None] = []
    for axis in axes:
        mesh_axis = rules.get(axis.name)
        if mesh_axis is None or mesh_axis in used or axis.size % mesh.shape[mesh_axis]:
            mesh_axes.append(None)
        else:
            used.add(mesh_axis)
            mesh_axes.append(mesh_axis)
    return mesh_axes


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
