"""Levanter's InferenceEngine as a process that generates, in float32 (see protocol.py).

Its sizes are as small as the requests allow, because it is fastest with these. Each call serves its requests together;
the first two calls compile the prefill, the first one the decode loop.
"""
# pyright: reportMissingImports=false
# It runs in its own environment.

import time
from typing import Any

import jax
import jax.numpy as jnp
from levanter.compat.hf_checkpoints import load_tokenizer
from levanter.inference.engine import InferenceEngine, InferenceEngineConfig, Request
from levanter.inference.jit_scheduler import SeqDecodingParams
from levanter.layers.sampler import Sampler
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
from levanter.trainer import TrainerConfig
from protocol import Generate, Prompts, serve

PAGE_SIZE = 128


def leave_out_sorts() -> None:
    """Remove both sorts of the whole vocabulary from the sampling of every token.

    The sampler filters by top-p in vocabulary space: one argsort orders the logits, a second one inverts that order.
    It does so for any top_p, and even for greedy rows, whose result it then discards in favour of the argmax. At top_p
    1 the filter keeps every token (except for 1e-4 of mass, within its tolerance), so the logits can pass unchanged;
    greedy tokens are the same either way.
    """
    Sampler._apply_top_p = lambda self, scaled_logits, top_ps: scaled_logits


def load(settings: dict[str, Any]) -> Generate:
    if not settings["sorts"]:
        leave_out_sorts()
    path, batch, max_seq_len = settings["model"], settings["batch"], settings["max_seq_len"]
    num_pages_per_seq = -(-max_seq_len // PAGE_SIZE)
    tokenizer = load_tokenizer(path)
    trainer = TrainerConfig()
    with trainer.use_device_mesh():
        converter = LlamaConfig().hf_checkpoint_converter(path)
        model = converter.load_pretrained(LlamaLMHeadModel, ref=path, dtype=jnp.float32)
        engine = InferenceEngine.from_model_with_config(
            model=model,
            tokenizer=tokenizer,
            config=InferenceEngineConfig(
                max_seq_len=num_pages_per_seq * PAGE_SIZE,
                page_size=PAGE_SIZE,
                max_seqs=batch,
                max_pages=batch * num_pages_per_seq,
                max_seqs_in_prefill=batch,
                max_prefill_size=settings["prompt_tokens"],
                compute_dtype=jnp.float32,
            ),
            axis_resources=trainer.compute_axis_mapping,
        )

    def generate(prompts: Prompts, max_tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        decode_starts: list[float] = []
        requests = [
            Request(
                prompt_tokens=prompt,
                request_id=index,
                decode_params=SeqDecodingParams(
                    max_num_tokens=jnp.array(len(prompt) + max_tokens, jnp.int32),
                    stop_tokens=None,
                    temperature=jnp.array(0.0, jnp.float32),
                    top_p=jnp.array(1.0, jnp.float32),
                    key=jax.random.PRNGKey(0),
                ),
                n_generations=1,
            )
            for index, prompt in enumerate(prompts)
        ]
        with trainer.use_device_mesh():
            # Called before each round of decoding; at the first call, the prefill's tokens are on the host.
            result = engine.generate(requests, step_callback=lambda _: decode_starts.append(time.perf_counter()))
        end = time.perf_counter()
        return {
            "tokens": [list(map(int, tokens)) for tokens in result.tokens],
            "prefill_seconds": decode_starts[0] - start,
            "decode_seconds": end - decode_starts[0],
            "decode_tokens": len(prompts) * (max_tokens - 1),
        }

    return generate


if __name__ == "__main__":
    serve(("marin-levanter", "jax"), load)
