"""Serve the same requests on one and on two virtual devices, and print the results as one line of JSON.

A separate script, started by test_two_devices.py: the number of CPU devices is fixed when jax starts.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from random_weights import random_weights
from tiny_model import TINY

from simpo_pipeline.distributed.mesh import MODEL_AXIS
from simpo_pipeline.distributed.programs import Programs, forbid_strays
from simpo_pipeline.inference import engine_programs
from simpo_pipeline.inference.config import EngineSizes, SamplingParams
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.ops.paged_attention_gpu import GpuPagedAttention
from simpo_pipeline.ops.paged_batch import PagedSequences

# The key/value heads of the first are sharded over two devices; of the second, each device has all three.
MODELS = [TINY, dataclasses.replace(TINY, num_heads=6, num_kv_heads=3, tie_word_embeddings=False)]


def tokens_by_layer(model: LlamaConfig, num_devices: int) -> dict[str, object]:
    """Serve with the weight layout of an engine on GPUs, and return the results."""
    parts = num_devices if model.num_kv_heads % num_devices == 0 else None
    as_it_was = engine_programs.lay_out
    engine_programs.lay_out = functools.partial(engine_programs.lay_out_by_layer, parts=parts)
    try:
        return tokens_of(model, num_devices)
    finally:
        engine_programs.lay_out = as_it_was


def tokens_of(model: LlamaConfig, num_devices: int) -> dict[str, object]:
    mesh = Mesh(np.array(jax.devices()[:num_devices]), (MODEL_AXIS,))
    programs = Programs()
    shapes = with_shardings(abstract_llama(model, jnp.float32), mesh, TENSOR_PARALLEL_RULES)
    weights = random_weights(model, shapes)
    engine = Engine(
        model,
        EngineSizes(max_seqs=4, max_seq_len=64, page_size=16, num_pages=16, prefill_chunk_tokens=64),
        mesh,
        programs,
    )
    rng = np.random.default_rng(0)
    requests = [
        Request(tuple(rng.integers(0, 300, size=20).tolist()), index, 0, SamplingParams(12, temperature=temperature))
        for index, temperature in enumerate((0.0, 0.0, 0.7, 0.0, 0.7))
    ]
    completions, _ = engine.generate(weights, requests, step=0)
    cache_bytes = engine.memory.cache
    return {"tokens": [completion.tokens for completion in completions], "cache_bytes": cache_bytes}


def attended_on_gpus(kv_heads: int, num_devices: int) -> list[float]:
    """Return the output of the GPU backend for random pages over `num_devices` devices, with its kernel interpreted."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), (MODEL_AXIS,))
    rng, replicated = np.random.default_rng(0), NamedSharding(mesh, PartitionSpec())
    pages = [rng.normal(size=(6, 16, kv_heads, 16)).astype(np.float32) for _ in range(2)]
    q = rng.normal(size=(12, 2 * kv_heads, 16)).astype(np.float32)
    table = np.arange(6, dtype=np.int32).reshape(3, 2)
    q, keys, values, *rest = jax.device_put(
        (q, *pages, table, np.array([0, 1, 2, 12], np.int32), np.array([30, 7, 20], np.int32)), replicated
    )

    def attend(q: jax.Array, pages: tuple[jax.Array, ...], *rest: jax.Array) -> jax.Array:
        return GpuPagedAttention(mesh, MODEL_AXIS).attend(q, pages, PagedSequences(*rest, num_single=2))

    program = Programs().compile("attend", attend, q, (keys, values), *rest, out_shardings=replicated)
    return np.asarray(program(q, (keys, values), *rest)).ravel().tolist()


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    forbid_strays()
    served = [[tokens_of(model, count) for count in (1, 2)] for model in MODELS]
    by_layer = [tokens_by_layer(model, 2) for model in MODELS]
    attended = [[attended_on_gpus(model.num_kv_heads, count) for count in (1, 2)] for model in MODELS]
    print(json.dumps({"served": served, "by_layer": by_layer, "attended": attended}))


if __name__ == "__main__":
    main()
