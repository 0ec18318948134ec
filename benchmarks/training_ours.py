"""Our trainer, as users call it, as a process that trains (see peers/protocol.py)."""

from typing import Any

import numpy as np
from peers.protocol import RECIPE, Pair, Update, serve_updates

from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.distributed.mesh import training_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.training.config import OptimizerConfig, SimpoConfig, TrainerConfig
from simpo_pipeline.training.trainer import Trainer

MOST_UPDATES = 1000


def load(settings: dict[str, Any], pairs: list[Pair]) -> Update:
    longest = max(len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected))
    config = TrainerConfig(
        num_train_steps=MOST_UPDATES,
        train_batch_size=len(pairs),
        train_seq_len=longest,
        packing=settings["packing"],
        remat=settings["remat"],
        simpo=SimpoConfig(beta=RECIPE.beta, gamma_beta_ratio=RECIPE.gamma_beta_ratio),
        optimizer=OptimizerConfig(
            learning_rate=RECIPE.learning_rate,
            beta1=RECIPE.betas[0],
            beta2=RECIPE.betas[1],
            epsilon=RECIPE.epsilon,
            max_grad_norm=RECIPE.max_grad_norm,
            warmup=0,
            lr_schedule="constant",
        ),
    )
    tokenized = [
        TokenizedPair(
            str(number), np.array(pair.chosen, np.int32), np.array(pair.rejected, np.int32), pair.start, pair.start
        )
        for number, pair in enumerate(pairs)
    ]
    trainer = Trainer.start(config, settings["model"], programs=Programs(), mesh=training_mesh())
    loader = PairLoader(
        pairs=tokenized,
        batch_size=len(pairs),
        seq_len=longest,
        seed=0,
        pad_id=0,
        num_updates=MOST_UPDATES,
        packing=config.packing,
        num_groups=trainer.num_groups,
    )
    losses: list[float] = []

    def update() -> float:
        trainer.train_until(trainer.step + 1, loader, lambda _, metrics: losses.append(metrics["loss"]))
        return losses[-1]

    return update


if __name__ == "__main__":
    serve_updates(("jax", "numpy"), load)
