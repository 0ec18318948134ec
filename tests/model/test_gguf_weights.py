"""The conversion of SmolLM2's GGUF file, and of small ones made here, in which every value is known."""

import json
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
