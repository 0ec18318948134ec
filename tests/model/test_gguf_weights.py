"""The conversion of SmolLM2's GGUF file, and of small ones made here, in which every value is known."""

import json
import struct
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from simpo_pipeline.errors import ModelError
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.gguf_weights import convert_gguf
from simpo_pipeline.model.hf_weights import load_config

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers_gguf.json"
PROMPT = "<|im_start|>user\nHi there, it's 2024!<|im_end|>\n"


def _write_gguf(path, **changes):
    """Write a GGUF file of one layer: 2 query heads, 1 key/value head, head_dim 4, embed 8, mlp 4, vocabulary of 5."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(4)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.pop("pre", "smollm"))
    writer.add_token_list(["<|end|>", "a", "b", "ab", "c"])
    writer.add_token_types([3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    for key, value in changes.pop("keys", {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32)
    if changes.pop("chat_template", True):
        writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in (_tensors() | changes.pop("tensors", {})).items():
        writer.add_tensor(name, tensor)
    assert not changes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors():
    shapes = {
        "token_embd": (5, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (4, 8),
        "blk.0.ffn_up": (4, 8),
        "blk.0.ffn_down": (8, 4),
    }
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_every_tensor_of_smollm2_is_what_transformers_reads_from_the_same_file(smollm2_folder):
    tensors = load_file(smollm2_folder / "model.safetensors")
    checksums = {name: zlib.crc32(tensor.tobytes()) for name, tensor in sorted(tensors.items())}
    assert checksums == json.loads(GOLDEN.read_text())


def test_the_config_of_smollm2_is_read_from_the_file(smollm2_folder):
    assert load_config(str(smollm2_folder)) == LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_seq_len=8192,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    )


def test_the_tokenizer_encodes_as_smollm2_does(smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(PROMPT))
    assert tokens[:4] == ["<|im_start|>", "user", "Ċ", "Hi"]
    # Each digit is one token, and so is the special token.
    assert tokens[-8:] == ["Ġ", "2", "0", "2", "4", "!", "<|im_end|>", "Ċ"]
    assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


def test_the_chat_template_opens_the_assistants_turn(smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert isinstance(text, str)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_only_query_and_key_rows_are_permuted(tmp_path):
    convert_gguf(_write_gguf(tmp_path / "small.gguf"), tmp_path)
    converted, original = load_file(tmp_path / "model.safetensors"), _tensors()
    # llama.cpp rotates rows (0, 1) and (2, 3) of a head as pairs, Hugging Face rows (0, 2) and (1, 3).
    head = np.asarray([0, 2, 1, 3])
    queries, keys = (original[f"blk.0.attn_{x}.weight"] for x in "qk")
    layer = "model.layers.0.self_attn"
    np.testing.assert_array_equal(converted[f"{layer}.q_proj.weight"], queries[[*head, *head + 4]])
    np.testing.assert_array_equal(converted[f"{layer}.k_proj.weight"], keys[head])
    np.testing.assert_array_equal(converted[f"{layer}.v_proj.weight"], original["blk.0.attn_v.weight"])
    assert len(converted) == len(original)


def test_an_output_tensor_unties_the_head(tmp_path):
    head = np.ones((5, 8), np.float32)
    convert_gguf(_write_gguf(tmp_path / "small.gguf", tensors={"output.weight": head}), tmp_path)
    assert not load_config(str(tmp_path)).tie_word_embeddings
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], head)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2'; only 'llama'"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'; only 'smollm'"),
        ({"chat_template": False}, "no chat template"),
        ({"tensors": {"blk.0.attn_q.bias": np.zeros(8, np.float32)}}, "'blk.0.attn_q.bias'"),
        ({"keys": {"llama.rope.dimension_count": 2}}, "llama.rope.dimension_count is 2; only the size of a head, 4"),
        ({"keys": {"llama.attention.value_length": 8}}, "llama.attention.value_length is 8; only the size of a head"),
        ({"keys": {"llama.vocab_size": 6}}, "llama.vocab_size is 6, but its tokenizer has 5 tokens"),
        ({"keys": {"llama.expert_count": 8}}, "llama.expert_count is 8, which may change what the model computes"),
        ({"keys": {"llama.attention.sliding_window": 8}}, "llama.attention.sliding_window is 8"),
    ],
)
def test_unsupported_files_are_refused_by_name(tmp_path, changes, words):
    path = _write_gguf(tmp_path / "small.gguf", **changes)
    with pytest.raises(ModelError, match=words):
        convert_gguf(path, tmp_path / "out")


def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path):
    path = _write_gguf(tmp_path / "small.gguf")
    whole = path.read_bytes()
    for num_bytes in (0, 3, 20, 300, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(ModelError, match=r"small\.gguf (is cut off or is no GGUF file|has no|: )|small\.gguf: "):
            convert_gguf(path, tmp_path / "out")


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _with_value(data: bytes, key: bytes, kind: int, value: bytes) -> bytes:
    """Return the file with another type and value of a setting that is an integer or fp32."""
    at = data.index(_text(key)) + len(_text(key))
    return data[:at] + struct.pack("<I", kind) + value + data[at + 8 :]


def _with_array(data: bytes, key: bytes, kind: int, length: int) -> bytes:
    """Return the file with another type and length of an array, but the same elements."""
    at = data.index(_text(key)) + len(_text(key))
    return data[: at + 4] + struct.pack("<IQ", kind, length) + data[at + 16 :]


def _with_norm(data: bytes, size: int = 8, kind: int = 0, offset: int | None = None) -> bytes:
    """Return the file with another size, type or offset of the tensor output_norm.weight."""
    at = data.index(_text(b"output_norm.weight")) + len(_text(b"output_norm.weight")) + 4
    rest = data[at + 12 :] if offset is None else struct.pack("<Q", offset) + data[at + 20 :]
    return data[:at] + struct.pack("<QI", size, kind) + rest


_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9
_F64, _I8 = 28, 24
# Number of dimensions and shape of the query matrix.
_QUERY_ROWS = _text(b"blk.0.attn_q.weight") + struct.pack("<IQQ", 2, 8, 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return _write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"GGML" + data[4:], "is no GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 99) + data[8:], "version 99"),
        (lambda data: data[:8] + struct.pack("<Q", 2**63) + data[16:], "is cut off"),
        (lambda data: data[:16] + struct.pack("<Q", 2**63) + data[24:], "is cut off"),
        (lambda data: data[:-1], "is cut off"),
        (lambda data: _with_array(data, b"tokenizer.ggml.token_type", _INT32, 2**60), "is cut off"),
        (lambda data: _with_array(data, b"tokenizer.ggml.tokens", _STRING, 2**60), "is cut off"),
        (lambda data: _with_array(data, b"tokenizer.ggml.token_type", 77, 5), "is no GGUF file"),
        (lambda data: _with_array(data, b"tokenizer.ggml.token_type", _FLOAT32, 5), "it must be a list of integers"),
        (
            lambda data: _with_value(data, b"llama.rope.freq_base", _ARRAY, struct.pack("<IQ", 9, 1) * 2000),
            "is cut off or is no GGUF file",
        ),
        (lambda data: _with_value(data, b"llama.block_count", _STRING, _text(b"1")), "block_count is '1'; .*integer"),
        (lambda data: _with_value(data, b"llama.block_count", _FLOAT32, struct.pack("<f", 1.5)), "block_count is 1.5"),
        (
            lambda data: _with_value(data, b"llama.attention.head_count", _ARRAY, struct.pack("<IQI", _UINT32, 1, 2)),
            r"head_count is \[2\]; it must be an integer",
        ),
        (
            lambda data: _with_value(data, b"llama.attention.head_count", _UINT32, bytes(4)),
            "num_heads must be at least",
        ),
        (lambda data: _with_value(data, b"llama.rope.freq_base", _STRING, _text(b"1e4")), "it must be a number"),
        (
            lambda data: _with_value(data, b"tokenizer.ggml.eos_token_id", _UINT32, struct.pack("<I", 99)),
            r"eos_token_id is 99, but the ids of its tokens are 0 to 4",
        ),
        (
            lambda data: _with_value(data, b"tokenizer.ggml.padding_token_id", _INT32, struct.pack("<i", -1)),
            "padding_token_id is -1",
        ),
        (lambda data: data.replace(_text(b"a b"), _text(b"a_b")), "merges has 'a_b', which does not join"),
        (lambda data: data.replace(_text(b"a b"), _text(b"b a")), "merges has 'b a', which does not join"),
        (lambda data: data.replace(_text(b"b") + _text(b"ab"), _text(b"a") + _text(b"ab")), "the same token twice"),
        (lambda data: data.replace(_text(b"ab"), _text(b"\xff\xfe")), "is no GGUF file"),
        (lambda data: _with_norm(data, kind=999), "is no GGUF file"),
        (lambda data: _with_norm(data, kind=_I8), "'output_norm.weight' has type I8, which cannot be converted"),
        (lambda data: _with_norm(data, size=4, kind=_F64), "'output_norm.weight' has type F64"),
        (lambda data: _with_norm(data, size=2**62), "is cut off"),
        (lambda data: _with_norm(data, offset=2**40), "is cut off"),
        (lambda data: _with_norm(data, offset=0), "inside other data"),
        (lambda data: _with_norm(data, offset=3), "inside other data or not aligned"),
        (lambda data: data.replace(_QUERY_ROWS, _QUERY_ROWS[:-8] + struct.pack("<Q", 7)), "rows must be whole heads"),
    ],
)
def test_a_file_with_impossible_content_is_refused_in_one_paragraph(tmp_path, whole, damage, words):
    path = tmp_path / "small.gguf"
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    with pytest.raises(ModelError, match=words) as refusal:
        convert_gguf(path, tmp_path / "out")
    assert "\n" not in str(refusal.value)
