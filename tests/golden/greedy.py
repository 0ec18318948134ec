"""Greedy answers of Hugging Face transformers to chat prompts, for the scripts in this folder."""

# torch is not installed where pyright runs.
# pyright: reportMissingImports=false

import numpy as np
import torch


def chat_tokens(tokenizer, text: str) -> list[int]:
    """Return the prompt of a conversation that begins with the user's `text`."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )


def greedy(model: torch.nn.Module, prompt: torch.Tensor, num_generated: int) -> tuple[list[int], list[float]]:
    """Return the tokens of transformers' own greedy search, and the gap between the two largest logits of each."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=num_generated,
        max_new_tokens=num_generated,
        eos_token_id=[],
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0, prompt.shape[1] :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def padded(prompts: list[list[int]]) -> np.ndarray:
    """Return the prompts as one array, padded on the right with -1."""
    longest = max(map(len, prompts))
    return np.asarray([prompt + [-1] * (longest - len(prompt)) for prompt in prompts], np.int32)
