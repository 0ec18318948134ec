"""Where each named axis of a parameter lies on the mesh, at rest and while it is computed with.

The forward pass never mentions a mesh: at rest, placement is these rules applied to an abstract tree; in use, it is
the `Placement` handed to `transform`. Knows nothing of which device belongs to which process.
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
from simpo_pipeline.ops.linear import TransposedProduct, scattered_product, transposed_product
from simpo_pipeline.ops.packed_attention import packed_attention_on

# Name of a parameter axis -> name of the mesh axis it is split over.
ShardingRules = Mapping[str, str]

# Generation: whole heads, slices of the MLP and of the vocabulary per device; "embed" stays whole.
TENSOR_PARALLEL_RULES: ShardingRules = MappingProxyType(
    {"heads": "model", "kv_heads": "model", "parts": "model", "mlp": "model", "vocab": "model"}
)

# Training: every matrix is split along its "embed" axis too, so each device holds 1/n of the master weights.
TRAINING_RULES: ShardingRules = MappingProxyType({**TENSOR_PARALLEL_RULES, "embed": "data"})

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
    return PartitionSpec(*_places(leaf.axes, mesh, rules))


def fsdp_placement(mesh: Mesh, dtype: DTypeLike, slot_lens: tuple[int, ...] = ()) -> Placement:
    """Fully sharded data parallelism: rows split over the mesh axis "data", weights gathered along it layer by layer.

    Over the mesh axis "model" weights stay split, and each device computes its heads and its slice of the MLP.

    Left to itself, XLA splits the sum over "embed" instead, with every device computing every sequence. Matrices
    are cast to `dtype` before they travel; gradients are summed over devices in their own dtype, and each device
    receives only its part of the sum. On one device there is nothing to place. Rows with slots of `slot_lens` attend
    slot by slot; others by a kernel where there is one, on TPUs.
    """
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    in_rows = _in_rows if on_tpu else ANYWHERE.residual
    attend = _attend_on(mesh, slot_lens)
    if mesh.size == 1:
        return ANYWHERE._replace(residual=in_rows, attend=attend, keeps_heads=on_tpu)

    def at(array: NamedArray, spec: PartitionSpec) -> NamedArray:
        return NamedArray(jax.lax.with_sharding_constraint(array.array, NamedSharding(mesh, spec)), array.axes)

    def gathered_by(rules: ShardingRules) -> Callable[[NamedArray], NamedArray]:
        @jax.custom_vjp
        def gather(weight: NamedArray) -> NamedArray:
            # The scales of norms stay as they are. Matrices are widened again, so that their gradients are not rounded
            # on the way back; XLA drops the pair of casts.
            travels_as = dtype if weight.ndim > 1 else weight.dtype
            return at(weight.astype(travels_as), partition_spec(weight, mesh, rules)).astype(weight.dtype)

        def forward(weight: NamedArray) -> tuple[NamedArray, None]:
            return gather(weight), None

        def backward(_: None, gradient: NamedArray) -> tuple[NamedArray]:
            # Transposing the gather's own constraint would ask for the whole sum on every device.
            return (at(gradient, partition_spec(gradient, mesh, TRAINING_RULES)),)

        gather.defvjp(forward, backward)
        return gather

    def summed_in_parts(out_axes: Sequence[Axis], in_axes: Sequence[Axis]) -> TransposedProduct:
        places = _places((*out_axes, *in_axes), mesh, TRAINING_RULES)
        # Of several axes that are one of the matrix's, only the first may be split.
        out_place, in_place = places[0], places[len(out_axes)]
        if "data" not in places:
            return transposed_product
        scatters_in = in_place == "data"
        other = out_place if scatters_in else in_place
        return scattered_product(mesh, ("data",), scatters_in=scatters_in, other_axis=other)

    # A slice of a table that is split over devices would be gathered chunk by chunk: the tokens are split instead.
    by_token = NamedSharding(mesh, PartitionSpec(("data", "model")))
    return Placement(
        weight=gathered_by(TENSOR_PARALLEL_RULES),
        hidden=lambda hidden: at(hidden, PartitionSpec("data")),
        residual=lambda hidden: in_rows(at(hidden, PartitionSpec("data"))),
        unembedding=gathered_by({}),
        predicting=lambda hidden: jax.lax.with_sharding_constraint(hidden, by_token),
        attend=attend,
        gradient=summed_in_parts,
        unembedding_gradient=scattered_product(mesh, ("data", "model"), scatters_in=True),
        keeps_heads=on_tpu,
    )


def _in_rows(hidden: NamedArray) -> NamedArray:
    """With the numbers of a token side by side; XLA's TPU backend else lays those of neighbours so, and relays all.

    Within layers only: elsewhere XLA gathers what it applies to on every device.
    """
    return NamedArray(with_layout_constraint(hidden.array, Layout(tuple(range(hidden.ndim)))), hidden.axes)


def _attend_on(mesh: Mesh, slot_lens: tuple[int, ...]) -> Attend:
    """How whole sequences attend on the devices of a mesh; their rows lie over "data", their heads over "model"."""
    if slot_lens:
        attention = packed_attention_on(mesh, "data", "model", slot_lens)
    elif mesh.devices.flat[0].platform == "tpu":
        attention = causal_attention_on(mesh, "data", "model")
    else:
        return attend_whole_sequences
    return lambda layer, q, k, v, state: (attention(q, k, v, state), state)


def _places(axes: Sequence[Axis], mesh: Mesh | AbstractMesh, rules: ShardingRules) -> list[str | None]:
    used: set[str] = set()
    places: list[str | None] = []
    for axis in axes:
        mesh_axis = rules.get(axis.name)
        if mesh_axis is None or mesh_axis in used or axis.size % mesh.shape[mesh_axis]:
            places.append(None)
        else:
            used.add(mesh_axis)
            places.append(mesh_axis)
    return places


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
