"""transformers' `generate` on the CPU as a process that generates (see protocol.py).

Batches are padded on the left and attention is torch's `scaled_dot_product_attention`; everything else is the default.
"""
# pyright: reportMissingImports=false
# It runs in its own environment.

import time
from typing import Any

import torch
from protocol import Generate, Prompts, in_batches, serve
from transformers import AutoModelForCausalLM


class FirstToken:
    """Time of a batch's first token, recorded as a stopping criterion, which `generate` calls after each token."""

    def __init__(self) -> None:
        self.time: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
        if self.time is None:
            self.time = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def left_padded(prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and the mask of tokens that are not padding."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def load(settings: dict[str, Any]) -> Generate:
    torch.set_num_threads(settings["threads"])
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype, attn_implementation="sdpa").eval()
    # No token ends a sequence, so none is banned either, as a minimum number of tokens would do.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate_batch(prompts: Prompts, max_tokens: int) -> tuple[list[list[int]], float]:
        ids, mask = left_padded(prompts)
        first = FirstToken()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                stopping_criteria=[first],
            )
        assert first.time is not None
        return output[:, ids.shape[1] :].tolist(), first.time

    return in_batches(settings["batch"], generate_batch)


if __name__ == "__main__":
    serve(("transformers", "torch"), load)
