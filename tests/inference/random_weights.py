"""Random parameters drawn by NumPy: compiling jax's draws of small arrays takes seconds for each model."""

import jax
import numpy as np

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.transformer import Llama


def random_weights(config: LlamaConfig, abstract: Llama, seed: int = 0) -> Llama:
    """Return parameters distributed like those of `init_llama`, with the dtypes and shardings of `abstract`."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if "norm" in jax.tree_util.keystr(path):
            drawn = np.ones(leaf.shape, np.float32)
        else:
            drawn = rng.standard_normal(leaf.shape, np.float32) * np.float32(config.initializer_range)
        return jax.device_put(drawn.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract)
