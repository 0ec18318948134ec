"""llama.cpp as a process that generates (see protocol.py), through the low-level calls of its Python binding.

`batch` sequences decode together, with one token of each per `llama_decode`, as in its own server and its
`llama-batched-bench`. Tokens are the argmax of the logits, in numpy.
"""
# pyright: reportMissingImports=false
# It runs in its own environment.

import time
from collections.abc import Iterable
from typing import Any

import llama_cpp
import numpy as np
from protocol import Generate, Prompts, in_batches, serve

# Maximum number of prompt tokens per call.
BATCH_TOKENS = 2048


class Batch:
    """A `llama_batch` that is filled again for each call."""

    def __init__(self) -> None:
        self.raw = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def fill(self, rows: Iterable[tuple[int, int, int, bool]]) -> None:
        """Fill the batch with rows of (token, position, sequence, whether its logits are needed)."""
        raw, count = self.raw, 0
        for token, position, sequence, wanted in rows:
            raw.token[count], raw.pos[count], raw.logits[count] = token, position, wanted
            raw.n_seq_id[count], raw.seq_id[count][0] = 1, sequence
            count += 1
        raw.n_tokens = count


def load(settings: dict[str, Any]) -> Generate:
    # The callback must outlive the library's use of it.
    settings["log"] = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(settings["log"], None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(settings["gguf"].encode(), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp could not load {settings['gguf']}"
    num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    params.n_threads = params.n_threads_batch = settings["threads"]
    params.n_seq_max = settings["batch"]
    params.n_ctx = settings["batch"] * settings["max_seq_len"]
    params.n_batch = BATCH_TOKENS
    # Each sequence has its own cache; with a shared one, attention would also read the keys of all other sequences.
    params.kv_unified = False
    params.type_k = params.type_v = settings["kv_type"]
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, f"llama.cpp could not make a context of {params.n_ctx} tokens"
    memory = llama_cpp.llama_get_memory(context)
    batch = Batch()

    def run(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Return the likeliest next token of each row that needs logits."""
        batch.fill(rows)
        status = llama_cpp.llama_decode(context, batch.raw)
        assert status == 0, f"llama_decode returned {status}"
        wanted = [index for index, row in enumerate(rows) if row[3]]
        logits = (llama_cpp.llama_get_logits_ith(context, index) for index in wanted)
        return [int(np.ctypeslib.as_array(row, shape=(num_vocab,)).argmax()) for row in logits]

    def prefill(prompts: Prompts) -> list[int]:
        """Return the first token of each prompt, with as many prompts per call as fit."""
        first: list[int] = []
        rows: list[tuple[int, int, int, bool]] = []
        for sequence, prompt in enumerate(prompts):
            if len(rows) + len(prompt) > BATCH_TOKENS:
                first += run(rows)
                rows = []
            last = len(prompt) - 1
            rows += [(token, position, sequence, position == last) for position, token in enumerate(prompt)]
        return first + run(rows)

    def generate_batch(prompts: Prompts, max_tokens: int) -> tuple[list[list[int]], float]:
        llama_cpp.llama_memory_clear(memory, False)
        drawn = [prefill(prompts)]
        prefilled = time.perf_counter()
        for step in range(max_tokens - 1):
            rows = [(token, len(prompts[seq]) + step, seq, True) for seq, token in enumerate(drawn[-1])]
            drawn.append(run(rows))
        return [list(column) for column in zip(*drawn, strict=True)], prefilled

    return in_batches(settings["batch"], generate_batch)


if __name__ == "__main__":
    serve(("llama-cpp-python",), load)
