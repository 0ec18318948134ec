"""The safetensors files of a folder: which files hold the weights, and what their headers say.

Everything but the data is read and checked: the index, and every header to the last byte that it promises. Only the
needed ranges of a file are read, also from object stores. The format: https://huggingface.co/docs/safetensors. This
module does not know which tensors a model has (see `hf_weights`).
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from simpo_pipeline.errors import ModelError
from simpo_pipeline.storage.files import list_files, open_read, read_bytes
from simpo_pipeline.storage.filesystem import storage_border
from simpo_pipeline.storage.paths import join

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HOW_TO_CONVERT = (
    "Only these weights are read; a pickle (.bin, .pth) is never loaded, because it can run code. Download the model's "
    "safetensors with their index, or convert other weights once: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder) of transformers writes both"
)

# Limits of the safetensors library, and of NumPy.
_MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 32
_MAX_DIMENSION = 2**63 - 1
_LENGTH_BYTES = 8
_BITS: Mapping[str, int] = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_COMPARED_BYTES = 1 << 24


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file."""

    path: str  # of the file
    dtype: str  # as the format spells it, e.g. BF16
    shape: tuple[int, ...]
    start: int  # position of the first byte in the file
    num_bytes: int


def stored_tensors(folder: str) -> dict[str, StoredTensor]:
    """Return the tensors of a model by name, from `model.safetensors` or from the files that the index names.

    Raises:
        ModelError: A file is missing, cut off or no safetensors file, or the index contradicts the files. The message
            names the file.
    """
    num_bytes = {entry.relative_path: entry.num_bytes for entry in list_files(folder)}
    # A folder may contain the same weights twice, e.g. consolidated and sharded. These two names select the files.
    if SINGLE_FILE in num_bytes:
        return _tensors_of(join(folder, SINGLE_FILE), num_bytes[SINGLE_FILE])
    if INDEX_FILE not in num_bytes:
        raise ModelError(f"{folder!r} contains neither {SINGLE_FILE} nor {INDEX_FILE}. {HOW_TO_CONVERT}")
    index_path = join(folder, INDEX_FILE)
    weight_map = _weight_map(index_path)
    tensors: dict[str, StoredTensor] = {}
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    for file, names in sorted(listed.items()):
        if file not in num_bytes:
            raise ModelError(f"{index_path} names the file {file!r:.200}, which is missing; copy or download it again")
        found = _tensors_of(join(folder, file), num_bytes[file])
        _refuse_contradictions(index_path, file, names, found)
        tensors |= found
    return tensors


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors of dtype F32, F16 or BF16 hold equal values. NaN equals NaN. Reads both."""
    if one.shape != other.shape:
        return False
    with open_read(one.path) as first, open_read(other.path) as second:
        values = zip(_chunks(first, one), _chunks(second, other), strict=True)
        return all(np.array_equal(left, right, equal_nan=True) for left, right in values)


def parse_object(data: bytes, path: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ModelError: The content is something else, or repeats a key. The message names the file.
    """
    if data.startswith(LFS_POINTER):
        raise _is_pointer(path)
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error!s:.200}); copy or download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {value!r:.80}; it must be a JSON object")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r:.80} occurs twice")
        name.encode()  # half of a surrogate pair is no text
        found[name] = value
    return found


def _weight_map(path: str) -> dict[str, str]:
    """Return tensor name -> file name from an index. Every file is directly in the folder of the index."""
    weight_map = parse_object(read_bytes(path), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has weight_map: {weight_map!r:.80}; it must give the file of every tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or any(sign in file for sign in "/\\\0"):
            raise ModelError(
                f"{path} says that the tensor {name!r:.80} is in {file!r:.200}; it must be the name of a safetensors "
                "file in the same folder"
            )
    return weight_map


def _refuse_contradictions(index_path: str, file: str, listed: set[str], found: Mapping[str, StoredTensor]) -> None:
    absent, unlisted = sorted(listed - found.keys()), sorted(found.keys() - listed)
    if absent:
        raise ModelError(
            f"{index_path} says that {file} contains {_some(absent)}, but it does not; index and files must belong to "
            "the same model: copy or download them again"
        )
    if unlisted:
        raise ModelError(
            f"{file} contains {_some(unlisted)}, which {index_path} does not list for this file; index and files must "
            "belong to the same model: copy or download them again"
        )


def _some(names: list[str]) -> str:
    return f"{names[0]!r:.200}" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _tensors_of(path: str, file_bytes: int) -> dict[str, StoredTensor]:
    """Return the tensors of one file, whose data must fill it exactly."""
    header, start = _header(path, file_bytes)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, f"its __metadata__ is {metadata!r:.80} instead of an object of texts")
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.start != end:
            raise _broken(path, f"the data of {name!r:.80} starts at byte {tensor.start} instead of {end}")
        end += tensor.num_bytes
    if end != file_bytes:
        raise _broken(path, f"it has {file_bytes} bytes, but its header describes {end}")
    return tensors


def _header(path: str, file_bytes: int) -> tuple[dict[str, Any], int]:
    """Return the header of a file and the position of its data."""
    with open_read(path) as file, storage_border("read", path):
        first = file.read(len(LFS_POINTER))
        if first.startswith(LFS_POINTER):
            raise _is_pointer(path)
        if len(first) < _LENGTH_BYTES:
            raise _broken(path, f"it has only {file_bytes} bytes")
        num_bytes = int.from_bytes(first[:_LENGTH_BYTES], "little")
        start = _LENGTH_BYTES + num_bytes
        if num_bytes > _MAX_HEADER_BYTES or start > file_bytes:
            raise _broken(path, f"it has {file_bytes} bytes, but announces a header of {num_bytes}")
        file.seek(_LENGTH_BYTES)
        text = file.read(num_bytes)
    if len(text) < num_bytes or not text.startswith(b"{"):
        raise _broken(path, "it has no header")
    return parse_object(text, f"the header of {path}"), start


def _tensor(path: str, name: str, entry: object, data_start: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **others} if not others:
            pass
        case _:
            raise _broken(path, f"its entry of {name!r:.80} is {entry!r:.80}")
    sizes = [*shape, begin, end]
    if len(shape) > _MAX_RANK or not all(type(size) is int and 0 <= size <= _MAX_DIMENSION for size in sizes):
        raise _broken(path, f"{name!r:.80} has the impossible shape {shape!r:.80} or offsets {[begin, end]!r:.80}")
    if dtype not in _BITS:
        raise _broken(path, f"{name!r:.80} has the unknown dtype {dtype!r:.40}")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise _broken(path, f"{name!r:.80} has {end - begin} bytes, which is not what {dtype} {shape!r:.80} needs")
    return StoredTensor(path, dtype, tuple(shape), data_start + begin, end - begin)


def _chunks(file: BinaryIO, tensor: StoredTensor) -> Iterator[np.ndarray]:
    """Yield the values of a tensor as fp32, in pieces of equal numbers of elements for every dtype."""
    itemsize = _BITS[tensor.dtype] // 8
    with storage_border("read", tensor.path):
        file.seek(tensor.start)
    left = math.prod(tensor.shape)
    while left:
        count = min(left, _COMPARED_BYTES // 4)
        with storage_border("read", tensor.path):
            data = file.read(count * itemsize)
        left -= count
        yield _as_float32(data, tensor.dtype)


def _as_float32(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        # NumPy has no bfloat16: it is the upper half of an fp32.
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def _broken(path: str, why: str) -> ModelError:
    return ModelError(
        f"{path} is cut off or is no safetensors file: {why}. Copy or download it again, and compare its size with "
        "that at the source"
    )


def _is_pointer(path: str) -> ModelError:
    return ModelError(
        f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in the source, or download the file"
    )
