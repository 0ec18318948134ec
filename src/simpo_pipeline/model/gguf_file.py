"""The content of a GGUF file (llama.cpp's format), checked: its settings have their types, and its tensors are whole.

The gguf package reads past the end of a file without an error, and believes every length in it. This module does not
know what the settings and tensors mean (see `gguf_weights`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor, dequantize

from simpo_pipeline.errors import ModelError, first_line


class GgufFile(NamedTuple):
    """The settings of a GGUF file by key, and its tensors by name. The tensors are memory-mapped."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, ReaderTensor]


def read_gguf(path: Path) -> GgufFile:
    """Return the content of a GGUF file.

    Raises:
        ModelError: The file is cut off or is no GGUF file, or the data of two tensors overlap.
    """
    try:
        reader = _BoundedReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise ModelError(
            f"{path} is cut off or is no GGUF file ({first_line(error):.200}); download it again"
        ) from error
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end or (tensor.data_offset - reader.data_offset) % reader.alignment:
            raise ModelError(
                f"{path}: the data of {tensor.name!r:.80} start at byte {tensor.data_offset}, which is inside other "
                "data or not aligned; download the file again"
            )
        end = tensor.data_offset + tensor.n_bytes
    return GgufFile(fields, {tensor.name: tensor for tensor in reader.tensors})


def values_of(path: Path, tensor: ReaderTensor) -> np.ndarray:
    """Return the values of a tensor as fp32.

    Raises:
        ModelError: Its type is one that the gguf package does not convert.
    """
    # GGUF lists the fastest-varying dimension first.
    shape = tuple(int(size) for size in reversed(tensor.shape))
    try:
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
    except NotImplementedError as error:
        raise ModelError(
            f"{path}: {tensor.name!r:.80} has type {tensor.tensor_type.name}, which cannot be converted to fp32; use "
            "the model's safetensors"
        ) from error


def refuse_other_types(path: Path, fields: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Check that each of these keys, if present, has a value of its kind.

    Raises:
        ModelError: A value is of another kind. The message names the key.
    """
    for key, kind in kinds.items():
        if key in fields and not _IS_KIND[kind](fields[key]):
            raise ModelError(
                f"{path}: {key} is {fields[key]!r:.80}; it must be {kind}. Download the file again, or use the model's "
                "safetensors"
            )


class _BoundedReader(GGUFReader):
    """A reader for which a value beyond the end of the file is an error.

    The plain one reads nothing there, so a wrong length of an array makes it append empty values for hours.
    """

    def _get(
        self,
        offset: int | np.integer,
        dtype: npt.DTypeLike,
        count: int | np.integer = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes, but announces data up to byte {end}")
        return super()._get(int(offset), dtype, int(count), override_order)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_IS_KIND: Mapping[str, Callable[[Any], bool]] = {
    "an integer": _is_integer,
    "a number": lambda value: _is_integer(value) or isinstance(value, float),
    "a text": _is_text,
    "a list of integers": lambda value: isinstance(value, list) and all(map(_is_integer, value)),
    "a list of texts": lambda value: isinstance(value, list) and all(map(_is_text, value)),
}
