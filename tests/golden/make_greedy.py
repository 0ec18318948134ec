"""Write transformers' greedy answers of SmolLM2-135M-Instruct to 128 real prompts, as a reference for the engine.

Run it as described in `make_transformers.py`, with the model's folder and experiments/data/prompts.txt. It writes,
beside this script, transformers_greedy.npz: `prompt_tokens` [128, longest] padded with -1; `generated_tokens`
[128, 64], not stopped by end-of-turn tokens; `margins` [128, 64], the gap between the two largest logits. All values
are fp32, computed on the CPU, one prompt at a time, without padding.
"""

# torch is not installed where pyright runs.
# pyright: reportMissingImports=false

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_PROMPTS, NUM_GENERATED = 128, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder made by convert_gguf")
    parser.add_argument("prompts", type=Path, help="file with one prompt per line")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    texts = [line.strip() for line in arguments.prompts.read_text().splitlines() if line.strip()][:NUM_PROMPTS]
    assert len(texts) == NUM_PROMPTS, f"{len(texts)} prompts, not {NUM_PROMPTS}"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]
    with torch.inference_mode():
        answers = [greedy(model, torch.tensor([prompt])) for prompt in prompts]
    longest = max(map(len, prompts))
    np.savez_compressed(
        Path(__file__).parent / "transformers_greedy.npz",
        allow_pickle=False,
        prompt_tokens=np.asarray([prompt + [-1] * (longest - len(prompt)) for prompt in prompts], np.int32),
        generated_tokens=np.asarray([tokens for tokens, _ in answers], np.int32),
        margins=np.asarray([margins for _, margins in answers], np.float32),
    )


def greedy(model: torch.nn.Module, prompt: torch.Tensor) -> tuple[list[int], list[float]]:
    """Return the tokens of transformers' own greedy search, and the margin of each choice."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=NUM_GENERATED,
        max_new_tokens=NUM_GENERATED,
        eos_token_id=[],
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0, prompt.shape[1] :].tolist(), (best[:, 0] - best[:, 1]).tolist()


if __name__ == "__main__":
    main()
