"""TRL's SimPO as a process that trains, in float32 (see protocol.py).

`CPOTrainer.get_batch_loss_metrics` is called on a trainer object that has only the settings it reads, so the time
excludes the work of TRL and transformers around an update (logging, schedules, hooks).
"""
# pyright: reportMissingImports=false
# It runs in its own environment.

from typing import Any

import torch
from accelerate import Accelerator
from protocol import RECIPE, Pair, Update, serve_updates
from transformers import AutoModelForCausalLM
from trl.experimental.cpo import CPOTrainer

IGNORED = -100


def make_trainer(model: torch.nn.Module) -> CPOTrainer:
    trainer = CPOTrainer.__new__(CPOTrainer)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.loss_type, trainer.beta, trainer.simpo_gamma = "simpo", RECIPE.beta, RECIPE.beta * RECIPE.gamma_beta_ratio
    trainer.label_smoothing, trainer.alpha, trainer.cpo_alpha = 0.0, 0.0, 0.0
    trainer.is_encoder_decoder, trainer.aux_loss_enabled, trainer.pad_token_id = False, False, 0
    trainer.model = model
    return trainer


def collated(side: str, sequences: list[list[int]], starts: list[int]) -> dict[str, torch.Tensor]:
    """Return a batch padded on the right to the longest sequence, as in TRL's own collator."""
    shape = len(sequences), max(map(len, sequences))
    tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, start : len(ids)] = torch.tensor(ids[start:])
        mask[row, : len(ids)] = 1
    return {f"{side}_input_ids": tokens, f"{side}_labels": labels, f"{side}_attention_mask": mask}


def load(settings: dict[str, Any], pairs: list[Pair]) -> Update:
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    trainer = make_trainer(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RECIPE.learning_rate, betas=RECIPE.betas, eps=RECIPE.epsilon, weight_decay=0.0
    )
    starts = [pair.start for pair in pairs]
    chosen = collated("chosen", [pair.chosen for pair in pairs], starts)
    batch = chosen | collated("rejected", [pair.rejected for pair in pairs], starts)

    def update() -> float:
        optimizer.zero_grad()
        loss, _ = trainer.get_batch_loss_metrics(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.max_grad_norm)
        optimizer.step()
        return loss.item()

    return update


if __name__ == "__main__":
    serve_updates(("trl", "transformers", "torch"), load)
