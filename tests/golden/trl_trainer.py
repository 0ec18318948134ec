"""TRL's `CPOTrainer` without a training run, for the scripts in this folder that call its methods."""

# torch and trl are not installed where pyright runs.
# pyright: reportMissingImports=false

from accelerate import Accelerator
from trl.experimental.cpo import CPOTrainer


def make_trainer(beta: float, ratio: float, smoothing: float = 0.0, sft_weight: float = 0.0) -> CPOTrainer:
    """Return a trainer for SimPO that has only the settings that its loss reads, and no model."""
    trainer = CPOTrainer.__new__(CPOTrainer)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.loss_type, trainer.beta, trainer.simpo_gamma = "simpo", beta, beta * ratio
    trainer.label_smoothing, trainer.alpha, trainer.cpo_alpha = smoothing, 0.0, sft_weight
    trainer.is_encoder_decoder, trainer.aux_loss_enabled, trainer.pad_token_id = False, False, 0
    return trainer
