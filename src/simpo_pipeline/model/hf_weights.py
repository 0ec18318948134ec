"""Parameters from and to Hugging Face's files: `config.json` and safetensors, one file or shards with an index.

Weights keep their orientation ([out, in]); only the head axes are folded and the layers stacked:

    model.layers.{i}.self_attn.q_proj.weight [heads * head_size, embed]  <->  layers.wq [layers, heads, head_size, embed]

Loading goes leaf by leaf, so host memory holds the largest leaf once besides the arrays already on the devices.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import jax
import ml_dtypes
import numpy as np
from haliax import NamedArray
from safetensors import safe_open
from safetensors.numpy import save_file

from simpo_pipeline.errors import ModelError
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.transformer import Llama, LlamaLayers
from simpo_pipeline.storage.files import list_files, local_copy, read_json
from simpo_pipeline.storage.paths import join
from simpo_pipeline.storage.staging import staged_folder

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
TOP_TENSORS: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 2**30
_MAX_NAMED = 5


def load_config(path: str) -> LlamaConfig:
    """The config of the model in a folder.

    Raises:
        ModelError: it is not a Llama that this package computes.
        PathNotFoundError: there is no config.json.
    """
    return LlamaConfig.from_hf(read_json(join(path, "config.json")))


def load_weights(path: str, abstract: Llama) -> Llama:
    """The parameters in a folder at any storage path, as device arrays.

    Args:
        path: Folder with `model.safetensors`, or with shards and their index.
        abstract: What to make: `jax.ShapeDtypeStruct`s whose dtypes are cast to on the host, and whose shardings, where
            given, say which part each device gets.

    Raises:
        ModelError: tensors are missing, left over, or of another shape; they are named.
    """
    with ExitStack() as stack:
        tensors = _open_tensors(path, stack)
        _check_names(path, tensors, abstract.config)

        def load(attribute: str, leaf: NamedArray, names: list[str]) -> NamedArray:
            host = _read_leaf(path, tensors, attribute, leaf, names)
            return NamedArray(_place(host, leaf.array), leaf.axes)

        layers = {
            attribute: load(attribute, getattr(abstract.layers, attribute), _layer_names(attribute, abstract.config))
            for attribute in LAYER_TENSORS
        }
        top = {
            attribute: None if (leaf := getattr(abstract, attribute)) is None else load(attribute, leaf, [name])
            for attribute, name in TOP_TENSORS.items()
        }
        return Llama(**top, layers=LlamaLayers(**layers), config=abstract.config)


def save_weights(path: str, model: Llama, dtype: str = "float32", max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes `config.json` and safetensors to a folder at any storage path.

    Args:
        path: The folder; made when it does not exist.
        model: Parameters as device or host arrays, all of them addressable by this process.
        dtype: `float32` or `bfloat16`.
        max_shard_bytes: More than this is split into shards with an index, as Hugging Face splits.

    Raises:
        ModelError: the dtype is none of the two.
    """
    if dtype not in DTYPES:
        raise ModelError(f"weights cannot be saved as {dtype!r}; choose one of {', '.join(DTYPES)}")
    shards = _split(model, DTYPES[dtype].itemsize, max_shard_bytes)
    with staged_folder(path) as folder:
        config = json.dumps({**model.config.to_hf(), "torch_dtype": dtype}, indent=2)
        (folder / "config.json").write_text(config + "\n")
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file_name = (
                f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            )
            weight_map |= dict.fromkeys(names, file_name)
            tensors = {name: _tensor(model, name, DTYPES[dtype]) for name in names}
            save_file(tensors, str(folder / file_name), metadata={"format": "pt"})
        if len(shards) > 1:
            total = model.config.num_parameters * DTYPES[dtype].itemsize
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _open_tensors(path: str, stack: ExitStack) -> dict[str, Any]:
    """The open safetensors file of each tensor; files are mapped, not read."""
    files = [entry.relative_path for entry in list_files(path) if entry.relative_path.endswith(".safetensors")]
    if not files:
        raise ModelError(f"{path!r} holds no safetensors weights; other formats are not supported")
    tensors: dict[str, Any] = {}
    for name in _shard_names(path, files):
        local = stack.enter_context(local_copy(join(path, name)))
        file = stack.enter_context(safe_open(str(local), framework="numpy"))
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def _shard_names(path: str, files: list[str]) -> list[str]:
    # Folders may hold the same weights twice, say consolidated beside sharded: the index says which files count.
    if "model.safetensors" in files:
        return ["model.safetensors"]
    if any(entry.relative_path == INDEX_FILE for entry in list_files(path)):
        return sorted(set(read_json(join(path, INDEX_FILE))["weight_map"].values()))
    return files


def _layer_names(attribute: str, config: LlamaConfig) -> list[str]:
    return [f"model.layers.{layer}.{LAYER_TENSORS[attribute]}.weight" for layer in range(config.num_layers)]


def _expected_names(config: LlamaConfig) -> list[str]:
    top = [name for attribute, name in TOP_TENSORS.items() if attribute != "head" or not config.tie_word_embeddings]
    return [*top, *(name for attribute in LAYER_TENSORS for name in _layer_names(attribute, config))]


def _check_names(path: str, tensors: Iterable[str], config: LlamaConfig) -> None:
    expected = set(_expected_names(config))
    missing = sorted(expected - set(tensors))
    # Old exports hold the rotary frequencies, and some tied ones the head again; neither is a parameter.
    known = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    known |= {TOP_TENSORS["head"]} if config.tie_word_embeddings else set()
    left_over = sorted(set(tensors) - expected - known)
    for what, names in (("lacks", missing), ("holds unexpected", left_over)):
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            raise ModelError(
                f"{path!r} {what} tensors {', '.join(names[:_MAX_NAMED])}{more}; "
                "weights and config.json must be of the same model"
            )


def _read_leaf(path: str, tensors: Mapping[str, Any], attribute: str, leaf: NamedArray, names: list[str]) -> np.ndarray:
    """One parameter on the host, stacked over layers where it has them, in its final dtype."""
    shape, dtype = leaf.array.shape, leaf.array.dtype
    host = np.empty(shape, dtype)
    rows = host if attribute in LAYER_TENSORS else host[None]
    for row, name in zip(rows, names, strict=True):
        wanted = _hf_shape(attribute, row.shape)
        found = tuple(tensors[name].get_slice(name).get_shape())
        if found != wanted:
            raise ModelError(f"{path!r}: tensor {name} has shape {found}, config.json says {wanted}")
        row[...] = tensors[name].get_tensor(name).reshape(row.shape).astype(dtype)
    return host


def _hf_shape(attribute: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in Hugging Face's files: heads and head_size folded into one axis."""
    if attribute in ("wq", "wk", "wv"):
        return (shape[0] * shape[1], shape[2])
    if attribute == "wo":
        return (shape[0], shape[1] * shape[2])
    return shape


def _place(host: np.ndarray, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    if abstract.sharding is None:
        return jax.device_put(host)
    return jax.make_array_from_callback(host.shape, abstract.sharding, lambda index: host[index])


def _tensor(model: Llama, name: str, dtype: np.dtype) -> np.ndarray:
    """One tensor as Hugging Face names and shapes it."""
    for attribute, top_name in TOP_TENSORS.items():
        if name == top_name:
            return np.ascontiguousarray(np.asarray(getattr(model, attribute).array).astype(dtype))
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    attribute = next(key for key, value in LAYER_TENSORS.items() if f"{value}.weight" == rest)
    row = np.asarray(getattr(model.layers, attribute).array)[int(layer)]
    return np.ascontiguousarray(row.reshape(_hf_shape(attribute, row.shape)).astype(dtype))


def _split(model: Llama, itemsize: int, max_shard_bytes: int) -> list[list[str]]:
    """Tensor names by shard, in order, each shard as full as it may be."""
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, size in _tensor_sizes(model):
        if shards[-1] and num_bytes + size * itemsize > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += size * itemsize
    return shards


def _tensor_sizes(model: Llama) -> Iterator[tuple[str, int]]:
    for name in _expected_names(model.config):
        for attribute, top_name in TOP_TENSORS.items():
            if name == top_name:
                yield name, math.prod(getattr(model, attribute).array.shape)
    for attribute in LAYER_TENSORS:
        for name in _layer_names(attribute, model.config):
            yield name, math.prod(getattr(model.layers, attribute).array.shape[1:])
