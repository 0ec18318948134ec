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
from greedy import chat_tokens, greedy, padded
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
    prompts = [chat_tokens(tokenizer, text) for text in texts]
    with torch.inference_mode():
        answers = [greedy(model, torch.tensor([prompt]), NUM_GENERATED) for prompt in prompts]
    np.savez_compressed(
        Path(__file__).parent / "transformers_greedy.npz",
        allow_pickle=False,
        prompt_tokens=padded(prompts),
        generated_tokens=np.asarray([tokens for tokens, _ in answers], np.int32),
        margins=np.asarray([margins for _, margins in answers], np.float32),
    )


if __name__ == "__main__":
    main()
