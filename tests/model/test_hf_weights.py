"""Hugging Face files: a saved model loads bit for bit, sharded or not, and mismatches are refused by name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from simpo_pipeline.errors import ModelError
from simpo_pipeline.model.hf_weights import load_config, load_weights, save_weights
from simpo_pipeline.model.sharding import TRAINING_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama, unembedding


def _assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_bit_for_bit(small_config, random_llama, tmp_path, tied):
    config = dataclasses.replace(small_config, tie_word_embeddings=tied)
    model = random_llama(config, seed=1)
    save_weights(str(tmp_path), model)
    assert load_config(str(tmp_path)) == config
    _assert_equal(load_weights(str(tmp_path), abstract_llama(config, jnp.float32)), model)


def test_tensors_have_hugging_faces_names_and_shapes(small_model, tmp_path):
    save_weights(str(tmp_path), small_model)
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(tensors) == 3 + 9 * 3
    layer = {name.removeprefix("model.layers.2."): t.shape for name, t in tensors.items() if ".layers.2." in name}
    assert layer == {
        "input_layernorm.weight": (24,),
        "post_attention_layernorm.weight": (24,),
        "self_attn.q_proj.weight": (48, 24),
        "self_attn.k_proj.weight": (16, 24),
        "self_attn.v_proj.weight": (16, 24),
        "self_attn.o_proj.weight": (24, 48),
        "mlp.gate_proj.weight": (40, 24),
        "mlp.up_proj.weight": (40, 24),
        "mlp.down_proj.weight": (24, 40),
    }
    # Head 1 of the second layer is rows 8 to 16 of its matrix.
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.q_proj.weight"][8:16], small_model.layers.wq.array[1, 1]
    )


def test_shards_respect_the_size_limit_and_load_as_one_model(small_config, small_model, tmp_path):
    save_weights(str(tmp_path), small_model, max_shard_bytes=20_000)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / name).values()) for name in names]
    assert len(names) > 2
    assert max(sizes) <= 20_000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == small_config.num_parameters * 4
    _assert_equal(load_weights(str(tmp_path), abstract_llama(small_config, jnp.float32)), small_model)


def test_a_tensor_larger_than_a_shard_gets_its_own_file(small_config, small_model, tmp_path):
    save_weights(str(tmp_path), small_model, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 + 9 * 3
    _assert_equal(load_weights(str(tmp_path), abstract_llama(small_config, jnp.float32)), small_model)


def test_dtypes_are_cast_both_ways(small_config, small_model, tmp_path):
    save_weights(str(tmp_path), small_model, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small_model)
    _assert_equal(load_weights(str(tmp_path), abstract_llama(small_config, jnp.bfloat16)), rounded)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    _assert_equal(load_weights(str(tmp_path), abstract_llama(small_config, jnp.float32)), widened)


def test_any_filesystem_works(small_config, small_model):
    save_weights("memory://models/small", small_model, max_shard_bytes=20_000)
    _assert_equal(load_weights("memory://models/small", abstract_llama(small_config, jnp.float32)), small_model)


def test_arrays_load_with_the_requested_shardings(small_config, small_model, tmp_path):
    save_weights(str(tmp_path), small_model)
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    abstract = with_shardings(abstract_llama(small_config, jnp.float32), mesh, TRAINING_RULES)
    loaded = load_weights(str(tmp_path), abstract)
    assert loaded.layers.wo.array.sharding == NamedSharding(mesh, PartitionSpec(None, "data", "model", None))
    _assert_equal(loaded, small_model)


def _rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_unexpected_and_misshapen_tensors_are_all_named(small_config, small_model, tmp_path):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
        tensors["model.norm.weight"] = np.zeros(25, np.float32)

    save_weights(str(tmp_path), small_model)
    _rewrite(tmp_path, damage)
    with pytest.raises(ModelError) as refusal:
        load_weights(str(tmp_path), abstract_llama(small_config, jnp.float32))
    for words in (
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.layers.0.self_attn.q_proj.bias is unexpected",
        "model.norm.weight has shape (25,) instead of (24,)",
    ):
        assert words in str(refusal.value)


def test_leftovers_of_old_exports_are_not_parameters(small_config, random_llama, tmp_path):
    config = dataclasses.replace(small_config, tie_word_embeddings=True)
    model = random_llama(config, seed=1)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    save_weights(str(tmp_path), model)
    _rewrite(tmp_path, add)
    _assert_equal(load_weights(str(tmp_path), abstract_llama(config, jnp.float32)), model)


def _save_head(folder, head):
    """Add a head to the file of a tied model."""
    _rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": head}))


@pytest.fixture
def tied_folder(small_config, random_llama, tmp_path):
    config = dataclasses.replace(small_config, tie_word_embeddings=True)
    save_weights(str(tmp_path), random_llama(config, seed=1))
    return tmp_path


def test_a_head_that_differs_from_a_tied_embedding_is_loaded_untied_with_a_warning(small_config, tied_folder, caplog):
    head = np.random.default_rng(0).normal(size=(96, 24)).astype(np.float32)
    _save_head(tied_folder, head)
    config = load_config(str(tied_folder))
    assert config == dataclasses.replace(small_config, tie_word_embeddings=False)
    assert load_config(str(tied_folder)) == config
    (record,) = caplog.records  # one, however often the folder is loaded
    assert record.levelname == "WARNING" and "lm_head.weight differs from model.embed_tokens.weight" in record.message
    model = load_weights(str(tied_folder), abstract_llama(config, jnp.float32))
    assert model.head is not None
    np.testing.assert_array_equal(model.head.array, load_file(tied_folder / "model.safetensors")["lm_head.weight"])
    np.testing.assert_array_equal(unembedding(model).array, head)


def test_one_last_number_unties_a_head(tied_folder):
    head = load_file(tied_folder / "model.safetensors")["model.embed_tokens.weight"].copy()
    head[-1, -1] = np.nextafter(head[-1, -1], np.float32(9))
    _save_head(tied_folder, head)
    assert not load_config(str(tied_folder)).tie_word_embeddings


def test_a_head_that_equals_the_embedding_stays_tied_in_silence(tied_folder, caplog):
    _save_head(tied_folder, load_file(tied_folder / "model.safetensors")["model.embed_tokens.weight"])
    config = load_config(str(tied_folder))
    assert config.tie_word_embeddings and not caplog.records
    assert load_weights(str(tied_folder), abstract_llama(config, jnp.float32)).head is None


def test_a_head_that_differs_is_never_dropped_even_without_load_config(small_config, tied_folder):
    _save_head(tied_folder, np.zeros((96, 24), np.float32))
    tied = abstract_llama(dataclasses.replace(small_config, tie_word_embeddings=True), jnp.float32)
    with pytest.raises(ModelError, match=r"lm_head\.weight with other values .*; take its config from load_config"):
        load_weights(str(tied_folder), tied)


def test_a_tied_head_of_another_shape_is_refused(tied_folder):
    _save_head(tied_folder, np.zeros((95, 24), np.float32))
    with pytest.raises(ModelError, match=r"lm_head\.weight has shape \(95, 24\) instead of \(96, 24\)"):
        load_config(str(tied_folder))


@pytest.mark.parametrize(("dtype", "itemsize"), [("F8_E4M3", 1), ("F64", 8), ("I8", 1), ("U16", 2), ("I32", 4)])
def test_weights_of_other_dtypes_are_refused_by_name(small_model, tmp_path, dtype, itemsize):
    save_weights(str(tmp_path), small_model)
    path = tmp_path / "model.safetensors"
    header = {"model.norm.weight": {"dtype": dtype, "shape": [24], "data_offsets": [0, 24 * itemsize]}}
    end = 24 * itemsize
    for tensor, array in load_file(path).items():
        if tensor not in header:
            header[tensor] = {"dtype": "F32", "shape": [*array.shape], "data_offsets": [end, end := end + array.nbytes]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    for check in (load_config, lambda folder: load_weights(folder, abstract_llama(small_model.config, jnp.float32))):
        with pytest.raises(
            ModelError, match=rf"model\.norm\.weight has dtype {dtype}, which is none of F32, F16, BF16"
        ):
            check(str(tmp_path))


def test_half_a_file_is_refused_without_a_fetch_step(small_config, small_model, tmp_path):
    save_weights(str(tmp_path), small_model)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for check in (load_config, lambda folder: load_weights(folder, abstract_llama(small_config, jnp.float32))):
        with pytest.raises(
            ModelError, match=r"model\.safetensors is cut off or is no safetensors file: it has \d+ bytes"
        ):
            check(str(tmp_path))


def test_weights_of_another_shape_than_config_json_are_refused_with_the_config(small_model, tmp_path):
    save_weights(str(tmp_path), small_model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 4}))
    with pytest.raises(ModelError, match=r"q_proj\.weight has shape \(48, 24\) instead of \(24, 24\)"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_would_not_be_applied_is_refused(small_model, tmp_path, name):
    save_weights(str(tmp_path), small_model)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ModelError, match=rf"contains {name}, an adapter that would not be applied; merge it"):
        load_config(str(tmp_path))


def test_a_folder_without_weights_has_its_config_read(small_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config.to_hf()))
    assert load_config(str(tmp_path)) == small_config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{torn", "is not JSON"),
        ("[]", r"holds \[\]; it must be a JSON object"),
        ('{"hidden_size": 8, "hidden_size": 16}', "'hidden_size' occurs twice"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("[" * 60_000, "is not JSON"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"config\.json.*{words}"):
        load_config(str(tmp_path))


def test_a_folder_without_weights_is_refused_naming_the_expected_files(small_config, tmp_path):
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_weights(str(tmp_path), abstract_llama(small_config, jnp.float32))
