"""Trains the same toy run on one and on four virtual devices; prints what came out as one line of JSON.

A script of its own, started by test_many_devices.py: the number of CPU devices is fixed when jax starts.
"""

import json

import jax
import numpy as np
from jax.sharding import Mesh

from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.distributed.mesh import DATA_AXIS, MODEL_AXIS
from simpo_pipeline.distributed.programs import Programs, forbid_strays
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.training.config import OptimizerConfig, TrainerConfig
from simpo_pipeline.training.trainer import Trainer

MODEL = LlamaConfig(
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=40,
    max_seq_len=64,
    tie_word_embeddings=True,
    initializer_range=0.3,
)


def run_config(train_batch_size: int) -> TrainerConfig:
    return TrainerConfig(
        num_train_steps=3,
        train_batch_size=train_batch_size,
        train_seq_len=12,
        logprob_chunk_size=16,
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )


def mesh_of(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_devices]).reshape(num_devices, 1), (DATA_AXIS, MODEL_AXIS))


def make_loader() -> PairLoader:
    rng = np.random.default_rng(0)

    def tokens() -> np.ndarray:
        return rng.integers(1, 40, size=rng.integers(6, 13), dtype=np.int32)

    pairs = [TokenizedPair(f"toy-{index}", tokens(), tokens(), 3, 3) for index in range(6)]
    return PairLoader(pairs=pairs, batch_size=4, seq_len=12, seed=0, pad_id=0)


def train(programs: Programs, num_devices: int, stops: list[int]) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = Trainer.start_random(run_config(4), MODEL, programs=programs, mesh=mesh_of(num_devices))
    rows: list[dict[str, float]] = []
    for stop in stops:
        trainer.train_until(stop, make_loader(), lambda step, metrics: rows.append(metrics))
    return trainer, rows


def main() -> None:
    forbid_strays()
    programs = Programs()
    one, one_rows = train(programs, 1, [3])
    four, four_rows = train(programs, 4, [3])
    interleaved, _ = train(programs, 4, [1, 3])
    try:
        Trainer.start_random(run_config(6), MODEL, programs=programs, mesh=mesh_of(4))
        refusal = "none"
    except ConfigError as error:
        refusal = str(error)
    found = {
        "one": one_rows,
        "four": four_rows,
        "digests": [four.digest(), interleaved.digest()],
        "embed_per_device": sorted({shard.data.shape[-1] for shard in four.params.embedding.array.addressable_shards}),
        "largest_weight_difference": max(
            float(np.abs(np.asarray(a) - np.asarray(b)).max())
            for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True)
        ),
        "refusal": refusal,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
