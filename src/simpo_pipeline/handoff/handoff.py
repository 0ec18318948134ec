"""The handoff: trainer parameters become inference weights, on device.

One compiled program casts every leaf and moves it from the trainer's sharding to the engine's. No byte passes through
host memory or storage. Where nothing has to change (one device, same dtype) there is no program and no copy: the
weights *are* the parameters. The handoff knows pytrees of arrays; it does not know what a model is.
"""

import dataclasses
import math
from typing import Any

import jax

from simpo_pipeline.distributed.programs import Program, Programs
from simpo_pipeline.errors import ModelError


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
        num_bytes: Size of the inference weights over all devices, in bytes.
    """

    program: Program | None
    num_bytes: int

    def __call__(self, params: Any) -> InferenceWeights:
        """Borrows `params` (a pytree of device arrays, left alive and unchanged) and returns inference weights."""
        if self.program is None:
            return InferenceWeights(tree=params, shared=True, num_bytes=self.num_bytes)
        return InferenceWeights(tree=self.program(params), shared=False, num_bytes=self.num_bytes)


def build_handoff(programs: Programs, source: Any, target: Any) -> Handoff:
    """Compiles the handoff from the trainer's parameters to the engine's weights.

    Args:
        source: Pytree of `jax.ShapeDtypeStruct` with shardings: the parameters as the trainer holds them.
        target: The same tree with the dtypes and shardings that the engine wants.

    Raises:
        ModelError: The two trees differ in structure or in a shape.
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
    if all(_fits(held, wanted) for (_, held), wanted in zip(source_leaves, target_leaves, strict=True)):
        return Handoff(program=None, num_bytes=num_bytes)

    def cast(params: Any) -> Any:
        return jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), params, target)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    return Handoff(programs.compile("handoff", cast, source, out_shardings=shardings), num_bytes)


def _fits(held: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct) -> bool:
    return held.dtype == wanted.dtype and wanted.sharding.is_equivalent_to(held.sharding, len(held.shape))
