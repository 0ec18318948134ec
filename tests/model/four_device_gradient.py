"""Script that test_sharding.py runs with four virtual devices: one loss and gradient, on one device and on four."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TRAINING_RULES, fsdp_placement, with_shardings
from simpo_pipeline.model.transformer import (
    abstract_llama,
    attend_whole_sequences,
    transform,
    unembedding,
)
from simpo_pipeline.ops.linear import scattered_matmul
from simpo_pipeline.ops.logprobs import token_logprobs

SEQUENCES, POSITIONS = 8, 16


def compiled_gradient(config, mesh):
    """Return the compiled program and its placed arguments."""
    placement = fsdp_placement(mesh, jnp.float32)
    axes = (Axis("sequence", SEQUENCES), Axis("position", POSITIONS))

    def loss(model, tokens, positions):
        hidden, _ = transform(
            model,
            NamedArray(tokens, axes),
            NamedArray(positions, axes),
            attend=attend_whole_sequences,
            state=None,
            dtype=jnp.float32,
            placement=placement,
        )
        matrix = placement.unembedding(unembedding(model)).array
        rows = hidden.array.reshape(tokens.size, -1)
        return token_logprobs(rows, matrix, tokens.reshape(tokens.size), 40, placement.unembedding_gradient)[0].mean()

    abstract = with_shardings(abstract_llama(config, jnp.float32), mesh, TRAINING_RULES)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    rng = np.random.default_rng(0)
    host = jax.tree.map(lambda leaf: config.initializer_range * rng.standard_normal(leaf.shape, np.float32), abstract)
    tokens = rng.integers(0, config.vocab_size, (SEQUENCES, POSITIONS)).astype(np.int32)
    positions = np.broadcast_to(np.arange(POSITIONS, dtype=np.int32), tokens.shape)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    arguments = (jax.device_put(host, shardings), *(jax.device_put(x, rows) for x in (tokens, positions)))
    out = (NamedSharding(mesh, PartitionSpec()), shardings)
    return jax.jit(jax.value_and_grad(loss), out_shardings=out).lower(*arguments).compile(), arguments


def bytes_on_first_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def matmuls():
    """Return, for each sharding, the error of `scattered_matmul` against numpy and the spec of its result."""
    rng = np.random.default_rng(0)
    found = {}
    for case in (
        *(((4, 1), ("data",), False, None, 64, 8, 24), ((4, 1), ("data",), True, None, 64, 8, 24)),
        *(((2, 2), ("data",), True, "model", 64, 8, 24), ((2, 2), ("data",), False, "model", 64, 8, 24)),
        *(((2, 2), ("data", "model"), True, None, 64, 8, 24), ((4, 1), ("data",), True, None, 64, 8, 23)),
        ((4, 1), ("data",), True, None, 63, 8, 24),
    ):
        shape, rows_axes, scatters_in, other, num_rows, out_len, in_len = case
        mesh = Mesh(np.asarray(jax.devices()).reshape(shape), ("data", "model"))
        left, right = rng.normal(size=(num_rows, out_len)), rng.normal(size=(num_rows, in_len))
        for dtype in (jnp.float32, jnp.bfloat16):
            given = [jnp.asarray(x, dtype) for x in (left, right)]
            got = jax.jit(scattered_matmul(mesh, rows_axes, scatters_in=scatters_in, other_axis=other))(*given)
            expected = np.asarray(given[0], np.float64).T @ np.asarray(given[1], np.float64)
            difference = float(np.abs(np.asarray(got) - expected).max())
            found[str((*case, dtype.__name__))] = [difference, str(getattr(got.sharding, "spec", None))]
    return found


def main():
    config = LlamaConfig.from_hf(json.loads(sys.argv[1]))
    one, four = (Mesh(np.asarray(jax.devices()[:count]).reshape(count, 1), ("data", "model")) for count in (1, 4))
    single, single_arguments = compiled_gradient(config, one)
    split, split_arguments = compiled_gradient(config, four)
    (expected_loss, expected), (loss, gradient) = single(*single_arguments), split(*split_arguments)
    differences = [
        float(np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(np.asarray(want)).max())
        for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True)
    ]
    found = {
        "loss_difference": abs(float(loss) - float(expected_loss)),
        "relative_gradient_difference": max(differences),
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(split_arguments[0])),
        "parameter_bytes_per_device": bytes_on_first_device(split_arguments[0]),
        "gradient_bytes_per_device": bytes_on_first_device(gradient),
        "products": matmuls(),
        "shapes": sorted(set(re.findall(r"f32\[[\d,]*\]", split.as_text() or ""))),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
