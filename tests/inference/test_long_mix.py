"""A thousand prompts of all lengths with a cache for a twentieth of them; every token is checked."""

import dataclasses
import functools
from collections.abc import Callable

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis, NamedArray
from jax.sharding import Mesh
from tiny_model import TINY

from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.inference.config import EngineSizes, SamplingParams
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.sequence import Completion, Request
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.transformer import Llama, attend_whole_sequences, logits, transform

MODEL = dataclasses.replace(TINY, max_seq_len=2560)
NUM_PROMPTS = 1000
# Two tokens this close may be swapped between two correct computations in fp32.
TIE = 1e-4


def mixed_requests() -> list[Request]:
    """Return prompts of 1 to 2,000 tokens with 1 to 512 new ones; short and long ones are equally common."""
    rng = np.random.default_rng(0)
    num_prompt, num_new = (
        np.exp(rng.uniform(0, np.log(most + 1), size=NUM_PROMPTS)).astype(int).clip(1, most) for most in (2000, 512)
    )
    num_prompt[:2], num_new[:2] = (1, 2000), (512, 512)
    return [
        Request(tuple(rng.integers(0, 300, size=size).tolist()), index, 0, SamplingParams(int(new), temperature=0.0))
        for index, (size, new) in enumerate(zip(num_prompt, num_new, strict=True))
    ]


@functools.partial(jax.jit, static_argnames="size")
def gaps_to_likeliest(weights: Llama, tokens: jax.Array, size: int) -> jax.Array:
    """Return the gap between the largest logit and each next token's logit, by a forward pass without a cache."""
    axes = (Axis("batch", 1), Axis("position", size))
    positions = hax.arange(axes[1]).broadcast_axis(axes[0]).rearrange(axes)
    hidden, _ = transform(
        weights,
        NamedArray(tokens[None], axes),
        positions,
        attend=attend_whole_sequences,
        state=None,
        dtype=jnp.float32,
    )
    rows = logits(weights, hidden).array[0]
    following = jnp.concatenate([tokens[1:], tokens[:1]])
    return jnp.max(rows, axis=-1) - rows[jnp.arange(size), following]


def gaps_of(weights: Llama, completion: Completion) -> np.ndarray:
    """Return the gap between the largest logit and each generated token's logit."""
    prompt = completion.request.prompt_tokens
    tokens = np.array([*prompt, *completion.tokens], np.int32)
    size = next(size for size in (64, 256, 1024, 2560) if size >= len(tokens))
    gaps = gaps_to_likeliest(weights, np.pad(tokens, (0, size - len(tokens))), size)
    return np.asarray(gaps)[len(prompt) - 1 : len(tokens) - 1]


@pytest.mark.slow
def test_a_thousand_prompts_of_all_lengths_with_a_cache_for_a_twentieth_of_them(
    mesh: Mesh, weights_of: Callable[[LlamaConfig], Llama]
) -> None:
    weights, requests = weights_of(MODEL), mixed_requests()
    total = sum(len(request.prompt_tokens) + request.sampling.max_tokens for request in requests)
    sizes = EngineSizes(max_seqs=64, max_seq_len=2560, page_size=16, num_pages=total // 20 // 16)
    completions, stats = Engine(MODEL, sizes, mesh, Programs()).generate(weights, requests, step=0)
    assert stats.num_preemptions > 0
    assert [completion.request for completion in completions] == requests
    assert [len(completion.tokens) for completion in completions] == [
        request.sampling.max_tokens for request in requests
    ]
    assert {completion.finish_reason for completion in completions} == {"length"}
    gaps = np.concatenate([gaps_of(weights, completion) for completion in completions])
    ties = np.count_nonzero(gaps)
    print(f"{stats}; {len(gaps)} tokens, {ties} of them ties within {gaps.max():.1e}")
    assert gaps.max() < TIE
    assert ties <= len(gaps) / 1000
