"""Our engine as a process that generates (see peers/protocol.py), with the sizes that step `infer` would choose."""

from typing import Any

import jax
import jax.numpy as jnp
from peers.protocol import Generate, Prompts, serve

from simpo_pipeline.distributed.mesh import local_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.inference.sizing import Workload, available_memory_bytes, size_engine
from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama


def load(settings: dict[str, Any]) -> Generate:
    """Compile everything; `generate` compiles nothing more."""
    path, dtype = settings["model"], jnp.dtype(settings["dtype"])
    model, mesh = load_config(path), local_mesh()
    weights = load_weights(path, with_shardings(abstract_llama(model, dtype), mesh, TENSOR_PARALLEL_RULES))
    jax.block_until_ready(weights)
    batch, longest = settings["batch"], settings["max_seq_len"]
    work = Workload(batch, longest, longest, batch * longest)
    config = EngineConfig(max_seqs=batch, max_seq_len=longest)
    sizes = size_engine(config, model, dtype, work, mesh, available_memory_bytes(mesh))
    engine = Engine(model, sizes, mesh, Programs(), dtype)
    laid_out = jax.block_until_ready(engine.lay_out(weights))

    def generate(prompts: Prompts, max_tokens: int) -> dict[str, Any]:
        # Without stop tokens, no sequence finishes before `max_tokens`.
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        requests = [Request(tuple(prompt), index, 0, sampling) for index, prompt in enumerate(prompts)]
        completions, stats = engine.generate(laid_out, requests, step=0)
        return {
            "tokens": [list(completion.tokens) for completion in completions],
            "prefill_seconds": stats.prefill_seconds,
            "decode_seconds": stats.decode_seconds,
            "decode_tokens": stats.decoded_tokens,
            "num_preemptions": stats.num_preemptions,
            "host_seconds": stats.host_seconds,
            "scheduling_seconds": stats.scheduling_seconds,
        }

    return generate


if __name__ == "__main__":
    serve(("jax", "numpy"), load)
