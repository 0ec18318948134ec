"""Export of parameters that are sharded over the devices of a job to Hugging Face's files, one layer at a time.

Every process calls `export_weights` and launches the same programs: one per tensor outside the layers, and one for a
layer, launched with each layer's index. The programs cast the parameters on their devices and gather the results. So a
device needs memory for one layer beyond the parameters, and a host for one layer. Tensors are written to the file as
they arrive. Nothing is donated: the parameters are read and not changed. This module does not know about trainers or
tokenizers.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from haliax import NamedArray
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from simpo_pipeline.distributed.mesh import place
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.model.hf_weights import (
    INDEX_FILE,
    index_of,
    layer_leaves,
    split_into_files,
    stored_shapes,
    top_leaves,
)
from simpo_pipeline.model.transformer import Llama, LlamaLayers
from simpo_pipeline.storage.output_folder import OutputFolder

# dtype -> its name in the header of a safetensors file.
STORED_DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16"}
_HEADER_ALIGNMENT = 8


def export_weights(
    output: OutputFolder,
    params: Llama,
    abstract: Llama,
    mesh: Mesh,
    *,
    programs: Programs,
    dtype: str,
    max_shard_bytes: int,
    writes: bool,
) -> dict[str, list[str]]:
    """Write safetensors, with an index if there are several files.

    Args:
        output: The folder to write to.
        params: The parameters, borrowed.
        abstract: The shapes, dtypes and shardings of the parameters over all of `mesh`.
        mesh: The mesh that the parameters are sharded over.
        programs: Compiles the programs that cast and gather.
        dtype: One of `STORED_DTYPES`. The devices cast to it, rounding to nearest, ties to even.
        max_shard_bytes: Weights larger than this are split into files with an index, as in Hugging Face's layout.
        writes: Whether this process writes. The other processes only launch their part of the programs.

    Returns:
        File name -> names of its tensors, in order.

    Raises:
        StorageError: A file could not be written.
    """
    shapes, itemsize = stored_shapes(abstract), np.dtype(dtype).itemsize
    num_bytes = {name: int(np.prod(shape)) * itemsize for name, shape in shapes.items()}
    files = split_into_files(num_bytes, max_shard_bytes)
    tensors = _gather_tensors(params, abstract, mesh, programs, dtype)
    for file_name, names in files.items():
        with output.open_write(file_name) if writes else nullcontext() as file:
            if file is not None:
                file.write(safetensors_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                got, tensor = next(tensors)
                assert got == name, (got, name)
                if file is not None:
                    file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    if writes and len(files) > 1:
        output.write_json(INDEX_FILE, index_of(files, num_bytes))
    return files


def safetensors_header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """Return the header of a safetensors file. The tensors follow it in the order of `shapes`, without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": STORED_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _gather_tensors(
    params: Llama, abstract: Llama, mesh: Mesh, programs: Programs, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, tensor as stored) in the order of `stored_shapes`, in every process.

    The next program is launched after the previous one's tensors are on the host, so at most one layer is pending.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def cast(leaf: NamedArray) -> Array:
        return leaf.array.astype(dtype)

    def cast_layer(layers: LlamaLayers, number: Int32[Array, ""]) -> LlamaLayers:
        def one(leaf: NamedArray) -> Array:
            return jax.lax.dynamic_index_in_dim(leaf.array, number, keepdims=False).astype(dtype)

        return jax.tree.map(one, layers, is_leaf=lambda leaf: isinstance(leaf, NamedArray))

    # All programs are compiled before the first byte is written.
    number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    of_layer = programs.compile("export_layer", cast_layer, abstract.layers, number, out_shardings=whole)
    of_top = {
        name: (programs.compile(f"export_{field}", cast, leaf, out_shardings=whole), getattr(params, field))
        for field, name, leaf in top_leaves(abstract)
    }
    field_of = {name: (field, at) for field, names, _ in layer_leaves(abstract) for at, name in enumerate(names)}
    layer: dict[str, np.ndarray] = {}
    for name, shape in stored_shapes(abstract).items():
        if name in of_top:
            program, leaf = of_top[name]
            yield name, _on_host(program(leaf))
            continue
        field, at = field_of[name]
        if field not in layer:
            arrays = of_layer(params.layers, place(np.int32(at), whole))
            layer = {field: _on_host(getattr(arrays, field)) for field, _, _ in layer_leaves(abstract)}
            del arrays
        yield name, layer.pop(field).reshape(shape)


def _on_host(array: jax.Array) -> np.ndarray:
    """Return a replicated array on the host, copied from one of this process's devices."""
    return np.asarray(array.addressable_shards[0].data)
