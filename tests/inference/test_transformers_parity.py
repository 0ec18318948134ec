"""The engine's greedy tokens against Hugging Face transformers' on SmolLM2 (see tests/golden/)."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.inference.config import EngineSizes, SamplingParams
from simpo_pipeline.inference.engine import Engine, GenerationStats
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import Llama, abstract_llama

GOLDEN = Path(__file__).parents[1] / "golden"
# Two logits this close may be swapped between two correct computations in fp32.
TIE = 1e-4


@pytest.fixture(scope="module")
def smollm2(mesh: Mesh, smollm2_folder: Path) -> Llama:
    shapes = abstract_llama(load_config(str(smollm2_folder)), jnp.float32)
    return load_weights(str(smollm2_folder), with_shardings(shapes, mesh, TENSOR_PARALLEL_RULES))


def generate(
    smollm2: Llama, mesh: Mesh, prompts: Sequence[tuple[int, ...]], num_new: int, sizes: EngineSizes, copies: int = 1
) -> tuple[list[list[int]], GenerationStats]:
    """Return the greedy tokens of each prompt, requested `copies` times each, in the order of the prompts."""
    engine = Engine(smollm2.config, sizes, mesh, Programs())
    greedy = SamplingParams(max_tokens=num_new, temperature=0.0)
    requests = [Request(prompt, index, copy, greedy) for index, prompt in enumerate(prompts) for copy in range(copies)]
    completions, stats = engine.generate(smollm2, requests, step=0)
    return [list(completion.tokens) for completion in completions], stats


@pytest.mark.slow
def test_greedy_tokens_of_16_chat_prompts_equal_transformers_despite_preemptions(smollm2: Llama, mesh: Mesh) -> None:
    with np.load(GOLDEN / "transformers_smollm2.npz") as golden:
        prompts = [tuple(row[row >= 0].tolist()) for row in golden["prompt_tokens"]]
        expected = golden["generated_tokens"].tolist()
    sizes = EngineSizes(
        max_seqs=9, max_seq_len=96, page_size=4, num_pages=90, prefill_chunk_tokens=256, decode_steps_per_call=5
    )
    tokens, stats = generate(smollm2, mesh, prompts, 32, sizes)
    assert tokens == expected
    assert stats.num_preemptions > 0
    assert stats.shared_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "count", "copies"),
    [
        (EngineSizes(max_seqs=128, max_seq_len=192, page_size=64, num_pages=384), 128, 1),
        (
            EngineSizes(
                max_seqs=32,
                max_seq_len=192,
                page_size=8,
                num_pages=150,
                prefill_chunk_tokens=128,
                decode_steps_per_call=7,
            ),
            32,
            2,
        ),
    ],
    ids=["one_batch", "small_chunks_shared_and_preempted"],
)
def test_greedy_tokens_of_real_prompts_equal_transformers(
    smollm2: Llama, mesh: Mesh, sizes: EngineSizes, count: int, copies: int
) -> None:
    with np.load(GOLDEN / "transformers_greedy.npz") as golden:
        prompts = [tuple(row[row >= 0].tolist()) for row in golden["prompt_tokens"]]
        expected, margins = golden["generated_tokens"], golden["margins"]
    assert len(prompts) == 128
    prompts = prompts[:count]
    tokens, stats = generate(smollm2, mesh, prompts, 64, sizes, copies)
    ties = 0
    for row, found in enumerate(tokens):
        prompt = row // copies
        differs = np.nonzero(np.array(found) != expected[prompt])[0]
        # After a tie that is resolved differently, the rest continues a different text.
        if len(differs):
            ties += 1
            assert margins[prompt, differs[0]] < TIE, f"prompt {prompt} differs at token {differs[0]}"
    print(f"{ties} of {len(tokens)} answers diverge at a tie within {TIE}; {stats}")
    assert ties <= copies * count // 64
    assert (stats.num_preemptions > 0) == (copies > 1)
    assert copies == 1 or stats.shared_tokens > sum(map(len, prompts)) / 2
