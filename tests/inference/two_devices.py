"""Serves the same requests on one and on two virtual devices; prints the tokens as one line of JSON.

A script of its own, started by test_two_devices.py: the number of CPU devices is fixed when jax starts.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simpo_pipeline.distributed.mesh import MODEL_AXIS
from simpo_pipeline.distributed.programs import Programs, forbid_strays
from simpo_pipeline.inference.config import EngineSizes, SamplingParams
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama, init_llama

# Two devices share the key/value heads of the first; of the second, each keeps all three.
MODELS = [
    LlamaConfig(64, 96, 2, 4, 2, 16, 300, 256, initializer_range=0.2, tie_word_embeddings=True),
    LlamaConfig(64, 96, 2, 6, 3, 16, 300, 256, initializer_range=0.2),
]


def tokens_of(model: LlamaConfig, num_devices: int) -> dict[str, object]:
    mesh = Mesh(np.array(jax.devices()[:num_devices]), (MODEL_AXIS,))
    programs = Programs()
    shapes = with_shardings(abstract_llama(model, jnp.float32), mesh, TENSOR_PARALLEL_RULES)
    placement = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    key = jax.ShapeDtypeStruct((2,), np.uint32)
    weights = programs.compile("init", lambda key: init_llama(model, key), key, out_shardings=placement)(
        np.array([0, 1], np.uint32)
    )
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


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    forbid_strays()
    print(json.dumps([[tokens_of(model, count) for count in (1, 2)] for model in MODELS]))


if __name__ == "__main__":
    main()
