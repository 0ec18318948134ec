"""Train the same toy run on one virtual device and on meshes of several, and print the results as one line of JSON.

A separate script, started by test_many_devices.py: the number of CPU devices is fixed when jax starts. Its argument is
the model: the fields of `LlamaConfig`, as JSON.
"""

import dataclasses
import json
import sys
import tempfile

import jax
import numpy as np
from jax.sharding import Mesh

from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.distributed.mesh import DATA_AXIS, MODEL_AXIS
from simpo_pipeline.distributed.programs import Programs, forbid_strays
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.hf_weights import save_weights
from simpo_pipeline.training.config import OptimizerConfig, TrainerConfig
from simpo_pipeline.training.trainer import Trainer

RUN = TrainerConfig(
    num_train_steps=3,
    train_batch_size=8,
    train_seq_len=12,
    logprob_chunk_size=16,
    optimizer=OptimizerConfig(learning_rate=1e-3),
)
VARIANTS = {
    "padded": {},
    "packed": {"packing": True},
    **{f"{parts} parts": {"packing": True, "grad_accumulation": parts} for parts in (2, 4, 8)},
    "padded in 2 parts": {"grad_accumulation": 2},
    "all layers again": {"packing": True, "remat": "full"},
    "no layer again": {"packing": True, "remat": "none"},
}
# (devices that shard the batch, devices that shard each layer) -> the variants tested on this mesh.
MESHES = {
    (2, 1): ("packed",),
    (1, 2): ("packed",),
    (4, 1): ("padded", "packed"),
    (2, 2): ("padded", "packed", "2 parts"),
}


def mesh_of(data: int, model: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), (DATA_AXIS, MODEL_AXIS))


def make_loader(config: TrainerConfig, num_groups: int) -> PairLoader:
    rng = np.random.default_rng(0)

    def tokens() -> np.ndarray:
        return rng.integers(1, 40, size=rng.integers(6, 13), dtype=np.int32)

    pairs = []
    for index in range(10):
        prompt, chosen, rejected = tokens()[:3], tokens(), tokens()
        both = np.concatenate([prompt, chosen[3:]]), np.concatenate([prompt, rejected[3:]])
        pairs.append(TokenizedPair(f"toy-{index}", *both, 3, 3))
    return PairLoader(
        pairs=pairs,
        batch_size=config.train_batch_size,
        seq_len=config.train_seq_len,
        seed=0,
        pad_id=0,
        num_updates=config.num_train_steps,
        packing=config.packing,
        num_groups=num_groups,
    )


def train(trainer: Trainer, config: TrainerConfig, stops: tuple[int, ...] = (3,)) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for stop in stops:
        trainer.train_until(stop, make_loader(config, trainer.num_groups), lambda step, metrics: rows.append(metrics))
    return rows


def main() -> None:
    forbid_strays()
    model = LlamaConfig(**json.loads(sys.argv[1]))
    programs = Programs()
    configs = {name: dataclasses.replace(RUN, **changes) for name, changes in VARIANTS.items()}
    one = Trainer.start_random(RUN, model, programs=programs, mesh=mesh_of(1, 1))
    with tempfile.TemporaryDirectory() as folder:
        save_weights(folder, one.params)

        def start(config: TrainerConfig, *mesh: int) -> Trainer:
            # For each mesh, compiling the program of random weights takes as long as compiling an update.
            return Trainer.start(config, folder, programs=programs, mesh=mesh_of(*mesh))

        one_rows = train(one, RUN)
        curves = {f"{name} on (1, 1)": train(start(config, 1, 1), config) for name, config in configs.items()}
        for mesh, names in MESHES.items():
            for name in names:
                curves[f"{name} on {mesh}"] = train(start(configs[name], *mesh), configs[name])
        interleaved = start(RUN, 4, 1)
    four, both_axes = (
        Trainer.start_random(RUN, model, programs=programs, mesh=mesh_of(*mesh)) for mesh in ((4, 1), (2, 2))
    )
    train(four, RUN)
    train(interleaved, RUN, (1, 3))
    train(both_axes, RUN)
    try:
        Trainer.start_random(dataclasses.replace(RUN, train_batch_size=6), model, programs=programs, mesh=mesh_of(4, 1))
        refusal = "none"
    except ConfigError as error:
        refusal = str(error)
    found = {
        "one": one_rows,
        "curves": curves,
        "digests": [four.digest(), interleaved.digest()],
        "embedding_per_device": {
            "(4, 1)": four.params.embedding.array.addressable_shards[0].data.shape,
            "(2, 2)": both_axes.params.embedding.array.addressable_shards[0].data.shape,
        },
        "largest_weight_difference": max(
            float(np.abs(np.asarray(a) - np.asarray(b)).max())
            for other in (four, both_axes)
            for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
        ),
        "refusal": refusal,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
