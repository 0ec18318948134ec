"""Loading and saving of parameters as Hugging Face's files: `config.json` and safetensors, one file or several.

Several files have an index. Weights keep their orientation ([out, in]). Only the head axes are folded and the layers
stacked:

    model.layers.{i}.self_attn.q_proj.weight [heads * head_size, embed] <-> layers.wq [layers, heads, head_size, embed]

Tensors are read one at a time, directly into the shards of this process's devices. A host reads only these shards, and
needs memory for about one copy of them. The files are checked before (see `safetensors_files`). This module does not
know about tokenizers or other formats (see `gguf_weights`).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from haliax import Axis, NamedArray
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from simpo_pipeline.errors import ModelError
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    parse_object,
    same_values,
    stored_tensors,
)
from simpo_pipeline.model.transformer import Llama, LlamaLayers, abstract_llama
from simpo_pipeline.storage.files import list_names, local_copy, read_bytes, write_json
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
# A LoRA adapter changes the weights of the model in the same folder.
_ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
_DTYPES = ("F32", "F16", "BF16")

# The size at which Hugging Face itself splits weights.
MAX_SHARD_BYTES = 5_000_000_000

# Field of LlamaLayers -> name below "model.layers.<n>.".
LAYER_TENSORS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}
# Field of Llama -> name.
TOP_TENSORS: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_MAX_NAMED = 8

Index = tuple[slice, ...]
# (tensor name, index) -> the indexed part of the stored tensor, in the stored dtype.
ReadTensor = Callable[[str, Index], np.ndarray]


def load_config(path: str) -> LlamaConfig:
    """Return the config of the model in a folder, after a check of the folder's weights against it.

    The check reads the headers of all weight files (see `stored_tensors`). A head that config.json calls tied is
    compared with the embedding, and if their values differ, the returned config is untied, as in transformers. A folder
    without weights has only its config checked.

    Raises:
        ModelError: The model is not a Llama that this package supports, or its weights are not whole or do not match.
        PathNotFoundError: There is no config.json.
    """
    config_path = join(path, CONFIG_FILE)
    config = LlamaConfig.from_hf(parse_object(read_bytes(config_path), config_path))
    names = list_names(path)
    adapters = sorted(_ADAPTER_FILES.intersection(names))
    if adapters:
        raise ModelError(
            f"{path!r} contains {' and '.join(adapters)}, an adapter that would not be applied; merge it into the "
            "weights, or remove it"
        )
    if not any(name.endswith((".safetensors", INDEX_FILE)) for name in names):
        return config
    tensors = stored_tensors(path)
    _check_tensors(path, abstract_llama(config, np.float32), tensors)
    if not config.tie_word_embeddings or not _has_own_head(tensors):
        return config
    _warn_of_own_head(config_path)
    return dataclasses.replace(config, tie_word_embeddings=False)


def load_weights(path: str, abstract: Llama) -> Llama:
    """Load the parameters from a folder at any storage path, as device arrays.

    Args:
        path: Folder with `model.safetensors`, or with several safetensors files and their index.
        abstract: The parameters to load, as `jax.ShapeDtypeStruct`s. The host casts to their dtypes. Their shardings
            determine the part that each device gets; a leaf without a sharding goes to the first device.

    Raises:
        ModelError: A file is not whole (see `stored_tensors`), or tensors are missing, unexpected, or have another
            shape or dtype. The message names them. Or the head is tied in `abstract`, but not in the files.
    """
    stored = stored_tensors(path)
    _check_tensors(path, abstract, stored)
    if abstract.head is None and _has_own_head(stored):
        raise ModelError(
            f"{path!r} has {TOP_TENSORS['head']} with other values than {TOP_TENSORS['embedding']}, but was to be "
            "loaded as a model without a head of its own; take its config from load_config"
        )
    with ExitStack() as stack:
        files = {file: _open_file(file, stack) for file in sorted({tensor.path for tensor in stored.values()})}
        tensors = {name: files[tensor.path] for name, tensor in stored.items()}

        def read(name: str, part: Index) -> np.ndarray:
            return tensors[name].get_slice(name)[part]

        layers = {field: _load_leaf(leaf, names, read) for field, names, leaf in layer_leaves(abstract)}
        top = {field: _load_leaf(leaf, [name], read) for field, name, leaf in top_leaves(abstract)}
    return Llama(
        embedding=top["embedding"],
        layers=LlamaLayers(**layers),
        final_norm=top["final_norm"],
        head=top.get("head"),
        config=abstract.config,
    )


def save_weights(
    path: str, model: Llama, dtype: DTypeLike = np.float32, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `config.json` and safetensors to a folder at any storage path, so that transformers can load it.

    Args:
        path: The folder. It is created if it does not exist.
        model: Parameters as device or host arrays.
        dtype: Float dtype to cast to on the host.
        max_shard_bytes: Weights larger than this are split into files with an index, as in Hugging Face's layout.

    Raises:
        ModelError: A part of an array is in another process.
    """
    _refuse_remote_parts(model)
    dtype = np.dtype(dtype)
    tensors = dict(_host_tensors(model))
    num_bytes = {name: tensor.size * dtype.itemsize for name, tensor in tensors.items()}
    shards = split_into_files(num_bytes, max_shard_bytes)
    with OutputFolder(path).staged() as folder:
        write_json(str(folder / CONFIG_FILE), {**model.config.to_hf(), "torch_dtype": dtype.name})
        for file_name, names in shards.items():
            # Cast file by file, so that only one file's tensors exist in both dtypes at a time.
            cast = {name: np.ascontiguousarray(tensors[name].astype(dtype, copy=False)) for name in names}
            write_safetensors(folder / file_name, cast)
        if len(shards) > 1:
            write_json(str(folder / INDEX_FILE), index_of(shards, num_bytes))


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one local safetensors file, readable by every user who may read its folder."""
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors creates files that only their owner can read.
    path.chmod(path.parent.stat().st_mode & 0o666)


def stored_shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    """Return the shape of each stored tensor, in Hugging Face's order: embedding, layers, final norm, head."""
    top = {name: _stored_shape(leaf.axes) for _, name, leaf in top_leaves(model)}
    stacked = [(names, _stored_shape(leaf.axes[1:])) for _, names, leaf in layer_leaves(model)]
    shapes = {TOP_TENSORS["embedding"]: top.pop(TOP_TENSORS["embedding"])}
    for layer in range(model.config.num_layers):
        shapes |= {names[layer]: shape for names, shape in stacked}
    return shapes | top


def top_leaves(model: Llama) -> Iterator[tuple[str, str, NamedArray]]:
    """Yield (field, tensor name, leaf) of the parameters outside the layers."""
    for field, name in TOP_TENSORS.items():
        leaf = getattr(model, field)
        if leaf is not None:
            yield field, name, leaf


def layer_leaves(model: Llama) -> Iterator[tuple[str, list[str], NamedArray]]:
    """Yield (field, tensor name of each layer, leaf) of the stacked parameters."""
    for field, name in LAYER_TENSORS.items():
        names = [f"model.layers.{layer}.{name}.weight" for layer in range(model.config.num_layers)]
        yield field, names, getattr(model.layers, field)


def _stored_shape(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Return the shape in Hugging Face's files, with heads and head_size folded into one axis."""
    shape: list[int] = []
    for axis in axes:
        if axis.name == "head_size":
            shape[-1] *= axis.size
        else:
            shape.append(axis.size)
    return tuple(shape)


def _open_file(path: str, stack: ExitStack) -> Any:
    """Return an open safetensors file. It is memory-mapped, not read."""
    local = stack.enter_context(local_copy(path))
    try:
        return stack.enter_context(safe_open(local, framework="numpy"))
    except SafetensorError as error:
        raise ModelError(f"{path} is no safetensors file ({error}); copy or download it again") from error


@functools.cache  # Each step of a job loads the config; one warning per folder is enough.
def _warn_of_own_head(config_path: str) -> None:
    logger.warning(
        "%s has tie_word_embeddings: true, but %s differs from %s in the weights, so they are NOT tied, as in "
        "transformers; set it to false in config.json to make this explicit",
        *(config_path, TOP_TENSORS["head"], TOP_TENSORS["embedding"]),
    )


def _has_own_head(tensors: Mapping[str, StoredTensor]) -> bool:
    """Return whether a head is stored whose values differ from those of the embedding."""
    head = tensors.get(TOP_TENSORS["head"])
    return head is not None and not same_values(head, tensors[TOP_TENSORS["embedding"]])


def _check_tensors(path: str, abstract: Llama, stored: Mapping[str, StoredTensor]) -> None:
    expected = stored_shapes(abstract)
    if abstract.head is None and TOP_TENSORS["head"] in stored:
        # Some tied models repeat the head.
        expected[TOP_TENSORS["head"]] = expected[TOP_TENSORS["embedding"]]
    problems = [f"{name} is missing" for name in expected if name not in stored]
    # Old exports contain the rotary frequencies, which are no parameter.
    problems += [
        f"{name} is unexpected" for name in stored if name not in expected and not name.endswith("rotary_emb.inv_freq")
    ]
    problems += [
        f"{name} has shape {stored[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems += [
        f"{name} has dtype {stored[name].dtype}, which is none of {', '.join(_DTYPES)} (convert it to one of them)"
        for name in expected
        if name in stored and stored[name].dtype not in _DTYPES
    ]
    if problems:
        more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise ModelError(
            f"the tensors in {path!r} do not match the config: {'; '.join(problems[:_MAX_NAMED])}{more}. "
            "Weights and config.json must belong to the same model"
        )


def _load_leaf(leaf: NamedArray, names: list[str], read: ReadTensor) -> NamedArray:
    """Return the leaf as a device array. A stacked leaf is read from one tensor per layer."""
    struct = leaf.array
    is_stacked = leaf.axes[0].name == "layers"

    def shard(index: Index | None) -> np.ndarray:
        parts = (slice(None),) * len(leaf.axes) if index is None else index
        parts = tuple(slice(*part.indices(axis.size)) for part, axis in zip(parts, leaf.axes, strict=True))
        if not is_stacked:
            return _read_part(read, names[0], leaf.axes, parts).astype(struct.dtype)
        out = np.empty([part.stop - part.start for part in parts], struct.dtype)
        for row, layer in zip(out, range(parts[0].start, parts[0].stop), strict=True):
            row[...] = _read_part(read, names[layer], leaf.axes[1:], parts[1:])
        return out

    sharding = struct.sharding or SingleDeviceSharding(jax.devices()[0])
    return NamedArray(jax.make_array_from_callback(struct.shape, sharding, shard, dtype=struct.dtype), leaf.axes)


def _read_part(read: ReadTensor, name: str, axes: tuple[Axis, ...], parts: Index) -> np.ndarray:
    """Read the part of a stored tensor that `parts` selects over `axes`, where head_size is a separate axis."""
    at = next((i for i, axis in enumerate(axes) if axis.name == "head_size"), None)
    if at is None:
        return read(name, parts)
    head_size, heads = axes[at].size, parts[at - 1]
    folded = slice(heads.start * head_size, heads.stop * head_size)
    part = read(name, (*parts[: at - 1], folded, *parts[at + 1 :]))
    unfolded = part.reshape(*part.shape[: at - 1], heads.stop - heads.start, head_size, *part.shape[at:])
    return unfolded[(*(slice(None),) * at, parts[at])]


def _refuse_remote_parts(model: Llama) -> None:
    for leaf in jax.tree.leaves(model):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ModelError(
                f"an array of shape {leaf.shape} with {leaf.sharding} cannot be saved: parts of it are in other "
                "processes; hand the model off to this process's devices first"
            )


def _host_tensors(model: Llama) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, host array as stored) in Hugging Face's order: embedding, layers, final norm, head."""
    top = {name: np.asarray(leaf.array) for _, name, leaf in top_leaves(model)}
    layers = {
        name: array
        for _, names, leaf in layer_leaves(model)
        for name, array in zip(names, np.asarray(leaf.array), strict=True)
    }
    for name, shape in stored_shapes(model).items():
        yield name, top[name] if name in top else layers[name].reshape(shape)


def index_of(files: Mapping[str, list[str]], num_bytes: Mapping[str, int]) -> dict[str, Any]:
    """Return the index of weights in several files, as returned by `split_into_files`."""
    weight_map = {name: file_name for file_name, names in files.items() for name in names}
    return {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weight_map}


def split_into_files(num_bytes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Return file name -> tensor names, in order. Each file has at most `max_shard_bytes`, or one larger tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in num_bytes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
