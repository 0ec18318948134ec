"""The handoff: trainer parameters become inference weights, on device.

One compiled program casts every leaf and moves it from the trainer's sharding to the engines'. No byte passes through
host memory or storage. An engine on one host's devices wants the whole model there: the program lays it out over a
mesh (host, model), replicated over "host", and each process keeps its own row of the mesh, regrouped without a copy.
Where nothing has to change (one device, same dtype) there is no program and no copy: the weights *are* the parameters.
The handoff knows pytrees of arrays; it does not know what a model is.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simpo_pipeline.distributed.mesh import HOST_AXIS, hosts_mesh
from simpo_pipeline.distributed.programs import Program, Programs
from simpo_pipeline.errors import ModelError

# The mesh axis of each axis of an array.
Spec = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class InferenceWeights:
    """Weights lent to an engine.

    `shared` says that their buffers belong to the trainer: they live until its next update donates them, and must not
    be deleted here. Otherwise the weights are a copy, and `free` gives its memory back.
    """

    tree: Any
    shared: bool
    num_bytes: int

    def free(self) -> None:
        """Deletes the copy; does nothing to shared buffers."""
        if not self.shared:
            jax.tree.map(lambda leaf: leaf.delete(), self.tree)


@dataclasses.dataclass(frozen=True)
class Handoff:
    """A compiled handoff; call it with parameters shaped and sharded as it was built for.

    Attributes:
        program: The device program, or None where parameters already fit as they are.
        num_bytes: Size of the weights of one engine over all its devices, in bytes.
        shardings: What the engine wants, a pytree like the weights.
    """

    program: Program | None
    num_bytes: int
    shardings: Any

    def __call__(self, params: Any) -> InferenceWeights:
        """Borrows `params` (a pytree of device arrays, left alive and unchanged) and returns inference weights."""
        if self.program is None:
            return InferenceWeights(tree=params, shared=True, num_bytes=self.num_bytes)
        # The program alone moves anything: transfers beside it, through host memory too, raise where the backend can
        # tell (GPU and TPU).
        with jax.transfer_guard("disallow_explicit"):
            laid_out = self.program(params)
            # Both views share their buffers, so that of the whole job is forgotten at once.
            tree = jax.tree.map(_own_part, laid_out, self.shardings)
        return InferenceWeights(tree=tree, shared=False, num_bytes=self.num_bytes)


def build_handoff(programs: Programs, source: Any, target: Any) -> Handoff:
    """Compiles the handoff from the trainer's parameters to the engine's weights.

    Args:
        source: Pytree of `jax.ShapeDtypeStruct` with shardings: the parameters as the trainer holds them.
        target: The same tree with the dtypes and shardings that the engine wants: over the devices of the source, or
            over this process's own, where every process wants the same of its own.

    Raises:
        ModelError: The two trees differ in structure or in a shape.
        ConfigError: The processes' devices cannot be laid out alike.
    """
    source_leaves, source_tree = jax.tree.flatten_with_path(source)
    target_leaves, target_tree = jax.tree.flatten(target)
    if source_tree != target_tree:
        raise ModelError(f"handoff needs equal trees; the trainer holds {source_tree}, the engine wants {target_tree}")
    for (path, held), wanted in zip(source_leaves, target_leaves, strict=True):
        if held.shape != wanted.shape:
            name = jax.tree_util.keystr(path)
            raise ModelError(f"handoff of {name}: the trainer holds {held.shape}, the engine wants {wanted.shape}")
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in target_leaves)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    if all(_fits(held, wanted) for (_, held), wanted in zip(source_leaves, target_leaves, strict=True)):
        return Handoff(program=None, num_bytes=num_bytes, shardings=shardings)
    laid_out = jax.tree.map(_on_all_hosts, shardings, jax.tree.map(lambda leaf: leaf.sharding, source))

    def hand_over(params: Any) -> Any:
        return jax.tree.map(_move, params, source, target, laid_out)

    return Handoff(programs.compile("handoff", hand_over, source, out_shardings=laid_out), num_bytes, shardings)


def _move(leaf: jax.Array, held: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Any:
    """The leaf in the dtype and layout wanted.

    Stacks of matrices go layer by layer, so that what the collectives need on the way is a layer's worth: all at once,
    the bfloat16 weights of an 8B model need 3/4 of their own size again.
    """
    route = _route(_spec_by_axis(held), _spec_by_axis(wanted), sharding)

    def move(array: jax.Array, first_axis: int = 0) -> jax.Array:
        array = array.astype(wanted.dtype)
        for spec in route:
            stop = NamedSharding(sharding.mesh, PartitionSpec(*spec[first_axis:]))
            array = jax.lax.with_sharding_constraint(array, stop)
        return array

    travels = sharding.mesh.size > 1
    is_stack = leaf.ndim >= 3 and _spec_by_axis(held)[0] is None and _spec_by_axis(wanted)[0] is None
    return jax.lax.map(lambda layer: move(layer, 1), leaf) if travels and is_stack else move(leaf)


def _route(held: Spec, wanted: Spec, sharding: NamedSharding) -> list[Spec]:
    """The layouts a leaf goes through.

    On the mesh (host, model) it first trades parts within each host, then gathers over hosts, which is what the
    partitioner would not find by itself: it would gather everything everywhere and cut.
    """
    if HOST_AXIS not in sharding.mesh.axis_names:
        return [wanted]
    both = zip(held, wanted, strict=True)
    within_hosts = tuple(new if new is not None else (HOST_AXIS if old is not None else None) for old, new in both)
    return [within_hosts, wanted]


def _spec_by_axis(leaf: jax.ShapeDtypeStruct) -> Spec:
    """The mesh axis of each axis of a leaf, None where it is whole."""
    spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else ()
    return (*spec, *([None] * (len(leaf.shape) - len(spec))))


def _on_all_hosts(wanted: NamedSharding, held: NamedSharding) -> NamedSharding:
    """The layout over all devices of the source of which the wanted one is this process's part."""
    if wanted.device_set == held.device_set:
        return wanted
    assert isinstance(wanted.mesh, Mesh)
    return NamedSharding(hosts_mesh(held.device_set, list(wanted.mesh.devices.flat)), wanted.spec)


def _own_part(leaf: jax.Array, wanted: NamedSharding) -> jax.Array:
    """This process's part of an array that is replicated over hosts, as an array of its own; shares the buffers."""
    if leaf.sharding.device_set == wanted.device_set:
        return leaf
    shards = {shard.device: shard.data for shard in leaf.addressable_shards}
    assert isinstance(wanted.mesh, Mesh)
    own = [shards[device] for device in wanted.mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(leaf.shape, wanted, own)


def _fits(held: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct) -> bool:
    return held.dtype == wanted.dtype and wanted.sharding.is_equivalent_to(held.sharding, len(held.shape))
