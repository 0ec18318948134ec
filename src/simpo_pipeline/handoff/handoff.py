"""The handoff: conversion of trainer parameters to inference weights, on device.

One compiled program casts every leaf and moves it from the trainer's sharding to the engine's. No byte passes through
host memory or storage. An engine on the devices of one host needs the whole model there. The program then shards the
weights over a mesh (host, model), replicated over "host", and each process keeps its own row of the mesh, regrouped
without a copy. If nothing has to change (one device, same dtype), there is no program and no copy: the weights *are*
the parameters. The handoff knows pytrees of arrays; it does not know models.
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
    """Weights that are lent to an engine.

    If `shared` is true, the buffers belong to the trainer: they live until its next update donates them, and must not
    be deleted here. Otherwise the weights are a copy, and `free` releases its memory.
    """

    tree: Any
    shared: bool
    num_bytes: int

    def free(self) -> None:
        """Delete the copy; do nothing to shared buffers."""
        if not self.shared:
            jax.tree.map(lambda leaf: leaf.delete(), self.tree)


@dataclasses.dataclass(frozen=True)
class Handoff:
    """A compiled handoff; call it with parameters of the shapes and shardings that it was built for.

    Attributes:
        program: The device program, or None if the parameters fit as they are.
        num_bytes: Size of the weights of one engine over all its devices, in bytes.
        shardings: The shardings that the engine needs, a pytree like the weights.
    """

    program: Program | None
    num_bytes: int
    shardings: Any

    def __call__(self, params: Any) -> InferenceWeights:
        """Return inference weights from `params`, a borrowed pytree of device arrays that stays alive and unchanged."""
        if self.program is None:
            return InferenceWeights(tree=params, shared=True, num_bytes=self.num_bytes)
        # Only the program moves data. Any other transfer, including one through host memory, raises where the backend
        # can detect it (GPU and TPU).
        with jax.transfer_guard("disallow_explicit"):
            job_weights = self.program(params)
            # Both views share their buffers, so the view of the whole job is dropped at once.
            tree = jax.tree.map(_local_view, job_weights, self.shardings)
        return InferenceWeights(tree=tree, shared=False, num_bytes=self.num_bytes)


def build_handoff(programs: Programs, source: Any, target: Any) -> Handoff:
    """Compile the handoff from the trainer's parameters to the engine's weights.

    Args:
        source: Pytree of `jax.ShapeDtypeStruct` with shardings: the parameters of the trainer.
        target: The same tree with the dtypes and shardings that the engine needs, either over the devices of the source
            or over this process's own devices. In the latter case, every process needs the same layout on its devices.

    Raises:
        ModelError: The two trees differ in structure or in a shape.
        ConfigError: The devices of the processes cannot be arranged in the same layout.
    """
    source_leaves, source_tree = jax.tree.flatten_with_path(source)
    target_leaves, target_tree = jax.tree.flatten(target)
    if source_tree != target_tree:
        raise ModelError(f"handoff needs equal trees; the trainer has {source_tree}, the engine needs {target_tree}")
    for (path, held), wanted in zip(source_leaves, target_leaves, strict=True):
        if held.shape != wanted.shape:
            name = jax.tree_util.keystr(path)
            raise ModelError(f"handoff of {name}: the trainer has shape {held.shape}, the engine needs {wanted.shape}")
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in target_leaves)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    if all(_fits(held, wanted) for (_, held), wanted in zip(source_leaves, target_leaves, strict=True)):
        return Handoff(program=None, num_bytes=num_bytes, shardings=shardings)
    job_shardings = jax.tree.map(_job_sharding, shardings, jax.tree.map(lambda leaf: leaf.sharding, source))

    def hand_over(params: Any) -> Any:
        return jax.tree.map(_move, params, source, target, job_shardings)

    return Handoff(programs.compile("handoff", hand_over, source, out_shardings=job_shardings), num_bytes, shardings)


def _move(leaf: jax.Array, held: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Any:
    """Return the leaf with the wanted dtype and layout.

    Stacks of matrices are moved layer by layer, so the collectives need temporary memory for one layer only. If all
    layers were moved at once, the bfloat16 weights of an 8B model would need another 3/4 of their own size.
    """
    route = _route(_spec_by_axis(held), _spec_by_axis(wanted), sharding)

    def move(array: jax.Array, first_axis: int = 0) -> jax.Array:
        array = array.astype(wanted.dtype)
        for spec in route:
            next_sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec[first_axis:]))
            array = jax.lax.with_sharding_constraint(array, next_sharding)
        return array

    moves = sharding.mesh.size > 1
    is_stack = leaf.ndim >= 3 and _spec_by_axis(held)[0] is None and _spec_by_axis(wanted)[0] is None
    return jax.lax.map(lambda layer: move(layer, 1), leaf) if moves and is_stack else move(leaf)


def _route(held: Spec, wanted: Spec, sharding: NamedSharding) -> list[Spec]:
    """Return the layouts that a leaf goes through.

    On the mesh (host, model), shards are first exchanged within each host and then gathered over hosts. The partitioner
    would not find this route by itself: it would gather everything everywhere and then slice.
    """
    if HOST_AXIS not in sharding.mesh.axis_names:
        return [wanted]
    both = zip(held, wanted, strict=True)
    within_hosts = tuple(new if new is not None else (HOST_AXIS if old is not None else None) for old, new in both)
    return [within_hosts, wanted]


def _spec_by_axis(leaf: jax.ShapeDtypeStruct) -> Spec:
    """Return the mesh axis of each axis of a leaf, None for an axis that is not sharded."""
    spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else ()
    return (*spec, *([None] * (len(leaf.shape) - len(spec))))


def _job_sharding(wanted: NamedSharding, held: NamedSharding) -> NamedSharding:
    """Return the sharding over all devices of the source whose part on this process is the wanted one."""
    if wanted.device_set == held.device_set:
        return wanted
    assert isinstance(wanted.mesh, Mesh)
    return NamedSharding(hosts_mesh(held.device_set, list(wanted.mesh.devices.flat)), wanted.spec)


def _local_view(leaf: jax.Array, wanted: NamedSharding) -> jax.Array:
    """Return this process's part of an array that is replicated over hosts, as an array that shares its buffers."""
    if leaf.sharding.device_set == wanted.device_set:
        return leaf
    shards = {shard.device: shard.data for shard in leaf.addressable_shards}
    assert isinstance(wanted.mesh, Mesh)
    own = [shards[device] for device in wanted.mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(leaf.shape, wanted, own)


def _fits(held: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct) -> bool:
    return held.dtype == wanted.dtype and wanted.sharding.is_equivalent_to(held.sharding, len(held.shape))
