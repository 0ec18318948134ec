"""Workloads of `inference.py`: the repository's own prompts, as token ids under a chat template."""

import dataclasses
import json
import pathlib

from simpo_pipeline.data.chat import encode_chat, load_tokenizer
from simpo_pipeline.data.records import Message

DATA = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "data"


@dataclasses.dataclass(frozen=True)
class Workload:
    """Number of prompts, and the exact number of new tokens of each."""

    num_prompts: int
    max_tokens: int


WORKLOADS = {
    "A": Workload(128, 64),
    "B": Workload(32, 512),
    # For Levanter, which is too slow for the other workloads.
    "C": Workload(32, 64),
}
SCALING = tuple(Workload(num_prompts, 64) for num_prompts in (128, 512, 2048))


def encoded_prompts(model: pathlib.Path, num_prompts: int) -> list[list[int]]:
    """Return the first `num_prompts` prompts for a model, all different.

    The prompts of `prompts.txt` come first, then those of the preference pairs, then all of them again, each preceded
    by a requested answer length. No two share more than the start of the chat template and of such a request.
    """
    listed = [line.strip() for line in (DATA / "prompts.txt").read_text().splitlines() if line.strip()]
    pairs = (json.loads(line) for line in (DATA / "preferences.jsonl").read_text().splitlines())
    base = list(dict.fromkeys([*listed, *(pair["prompt"] for pair in pairs)]))
    texts = list(base)
    while len(texts) < num_prompts:
        num_words = 20 * len(texts) // len(base)
        texts += [f"In {num_words} words: {text}" for text in base]
    tokenizer = load_tokenizer(str(model))
    return [encode_chat(tokenizer, [Message("user", text)], add_generation_prompt=True) for text in texts[:num_prompts]]
