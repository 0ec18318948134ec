"""export writes a model folder that others read bit for bit, and leaves the trainer unchanged."""

import dataclasses
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import ExecutorStep, borrow, versioned
from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.storage.files import list_files, read_bytes, read_json
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.training.config import TrainerConfig
from steps.bodies.export import _model_config
from steps.export import ExportConfig, export
from steps.train import TrainConfig, train


@pytest.fixture
def trainer(model_path, pairs_path, trainer_config, step_run, tmp_path):
    """Return a live trainer after two updates that keeps a moving average."""
    config = TrainConfig(
        trainer=dataclasses.replace(trainer_config, ema_decay=0.5),
        model_path=model_path,
        pairs_path=pairs_path,
        stop_step=2,
    )
    return train(config, step_run).value


@pytest.fixture
def run_export(model_path, step_run, tmp_path):
    def run(trainer, output_path=None, **settings):
        output_path = output_path or str(tmp_path / "exported")
        run = dataclasses.replace(step_run, output=OutputFolder(output_path))
        export(ExportConfig(trainer, model_path, **settings), run)
        return output_path

    return run


def on_host(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def read_back(path, dtype):
    return on_host(load_weights(path, abstract_llama(load_config(path), dtype)))


def assert_same_bits(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


def test_float32_is_exported_bit_for_bit_and_the_trainer_is_unchanged(trainer, run_export, session, model_path):
    before, num_launches = trainer.digest(), len(session.programs.ledger.launches)
    path = run_export(trainer)
    assert trainer.digest() == before
    assert load_config(path) == trainer.model_config
    assert_same_bits(read_back(path, jnp.float32), on_host(trainer.params))
    # Two layers, the embedding and the final norm.
    assert len(session.programs.ledger.launches) - num_launches == 4
    start = on_host(load_weights(model_path, abstract_llama(trainer.model_config, jnp.float32)))
    assert any((one != other).any() for one, other in zip(read_back(path, jnp.float32), start, strict=True))


def test_bfloat16_is_rounded_to_nearest_and_half_as_large(trainer, run_export, tmp_path):
    path = run_export(trainer, dtype="bfloat16")
    rounded = [leaf.astype(jnp.bfloat16) for leaf in on_host(trainer.params)]
    assert_same_bits(read_back(path, jnp.bfloat16), rounded)
    assert read_json(f"{path}/config.json")["torch_dtype"] == "bfloat16"
    num_bytes = read_json(f"{path}/summary.json")["num_bytes"]
    assert num_bytes == 2 * trainer.model_config.num_parameters
    assert 0 < len(read_bytes(f"{path}/model.safetensors")) - num_bytes < 4000


def test_the_average_is_exported_instead_of_the_weights_on_request(trainer, run_export):
    path = run_export(trainer, weights="ema")
    assert_same_bits(read_back(path, jnp.float32), on_host(trainer.state.ema))
    assert not np.array_equal(on_host(trainer.state.ema)[0], on_host(trainer.params)[0])


def test_files_respect_the_size_limit_and_an_attempt_with_other_sizes_leaves_none(trainer, run_export):
    path = run_export(trainer)
    assert run_export(trainer, max_shard_bytes=9_000) == path
    names = [entry.relative_path for entry in list_files(path) if entry.relative_path.endswith(".safetensors")]
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 2
    sizes = [sum(tensor.nbytes for tensor in load_file(f"{path}/{name}").values()) for name in names]
    index = json.loads(read_bytes(f"{path}/model.safetensors.index.json"))
    assert index["metadata"]["total_size"] == sum(sizes) == 4 * trainer.model_config.num_parameters
    assert_same_bits(read_back(path, jnp.float32), on_host(trainer.params))


def test_any_filesystem_works(trainer, run_export):
    path = run_export(trainer, output_path="memory://exported/here", max_shard_bytes=9_000)
    assert_same_bits(read_back(path, jnp.float32), on_host(trainer.params))


def test_a_bucket_works(trainer, run_export, gcs_here):
    path = run_export(trainer, output_path=f"{gcs_here}/exported", max_shard_bytes=9_000)
    assert_same_bits(read_back(path, jnp.float32), on_host(trainer.params))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_reads_config_and_tokenizer(trainer, run_export, model_path):
    from transformers import AutoConfig, AutoTokenizer

    path = run_export(trainer, dtype="bfloat16")
    config = AutoConfig.from_pretrained(path)
    assert (config.model_type, config.hidden_size, config.tie_word_embeddings) == ("llama", 16, True)
    assert str(config.dtype).endswith("bfloat16")
    text = "What is 2 + 2?"
    assert AutoTokenizer.from_pretrained(path).encode(text) == AutoTokenizer.from_pretrained(model_path).encode(text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_the_weights(trainer, run_export, dtype):
    pytest.importorskip("torch", reason="torch is no dependency of this project; run it with `uv run --with torch`")
    from transformers import AutoModelForCausalLM

    path = run_export(trainer, dtype=dtype, max_shard_bytes=9_000)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    names = [entry.relative_path for entry in list_files(path) if entry.relative_path.endswith(".safetensors")]
    stored = {name: tensor for file in names for name, tensor in load_file(f"{path}/{file}").items()}
    read = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    # The tied head has its own name there.
    assert read.keys() - {"lm_head.weight"} == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(read[name], tensor.astype(np.float32))


def test_an_average_that_the_run_does_not_keep_is_refused(trainer, run_export):
    trainer._state = dataclasses.replace(trainer.state, ema=None)
    with pytest.raises(ConfigError, match=r"set trainer\.ema_decay, or export 'params'"):
        run_export(trainer, weights="ema")


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_plan_refuses_an_average_that_the_run_does_not_keep(ema_decay):
    run = TrainerConfig(num_train_steps=1, train_batch_size=1, train_seq_len=8, ema_decay=ema_decay)
    trained = borrow(ExecutorStep("train", None, TrainConfig(versioned(run), "model", "pairs", 1)))
    with nullcontext() if ema_decay else pytest.raises(ConfigError, match=r"set trainer\.ema_decay, or export"):
        ExportConfig(trained, "model", weights="ema")


def test_the_folder_of_another_model_is_refused(trainer, step_run, tmp_path):
    other = dataclasses.replace(trainer.model_config, num_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(other.to_hf()))
    with pytest.raises(ConfigError, match="contains a model whose shape differs"):
        export(ExportConfig(trainer, str(tmp_path)), step_run)


def test_a_head_that_config_json_calls_tied_but_is_not_is_exported_as_untied(model_path, tmp_path):
    tensors = load_file(f"{model_path}/model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(read_bytes(f"{model_path}/config.json"))
    trainer: Any = SimpleNamespace(model_config=load_config(str(tmp_path)))
    exported = _model_config(ExportConfig(trainer, str(tmp_path)), trainer)
    assert (read_json(f"{model_path}/config.json")["tie_word_embeddings"], exported["tie_word_embeddings"]) == (
        True,
        False,
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"dtype": "float16"}, "export dtype is 'float16'; expected one of float32, bfloat16"),
        ({"weights": "grads"}, "export weights is 'grads'; expected one of params, ema"),
        ({"max_shard_bytes": 0}, "export max_shard_bytes is 0"),
    ],
)
def test_invalid_settings_are_refused_when_the_step_is_defined(setting, words):
    with pytest.raises(ConfigError, match=words):
        ExportConfig(cast(Any, None), "model", **setting)
