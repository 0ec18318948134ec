"""The digest covers every bit of the state, the step and the data position, and nothing else."""

import jax
import numpy as np
import pytest

from simpo_pipeline.training.state import TrainState, state_digest
from simpo_pipeline.training.trainer import Trainer


@pytest.fixture
def state(tiny_model, tiny_run, programs, one_device) -> TrainState:
    return Trainer.start_random(tiny_run, tiny_model, programs=programs, mesh=one_device).state


def with_one_bit_flipped(state: TrainState, leaf_index: int) -> TrainState:
    leaves, tree = jax.tree.flatten(state)
    values = np.array(leaves[leaf_index])
    values.reshape(-1).view(np.uint8)[-1] ^= 1
    leaves[leaf_index] = jax.device_put(values, leaves[leaf_index].sharding)
    return jax.tree.unflatten(tree, leaves)


def test_one_bit_in_any_leaf_changes_the_digest(state):
    digests = {state_digest(state, step=1, data_position=2)}
    num_leaves = len(jax.tree.leaves(state))
    for index in range(num_leaves):
        digests.add(state_digest(with_one_bit_flipped(state, index), step=1, data_position=2))
    assert len(digests) == 1 + num_leaves


def test_step_and_data_position_are_part_of_the_digest(state):
    digests = {
        state_digest(state, step=step, data_position=position) for step, position in ((1, 2), (2, 2), (1, 3), (12, 1))
    }
    assert len(digests) == 4


def test_the_digest_depends_on_values_not_on_buffers(state):
    copied = jax.tree.map(lambda leaf: jax.device_put(np.array(leaf), leaf.sharding), state)
    assert state_digest(copied, step=1, data_position=2) == state_digest(state, step=1, data_position=2)


def test_swapping_two_leaves_changes_the_digest(state):
    swapped = TrainState(state.params, state.opt_state, state.rng)
    leaves, tree = jax.tree.flatten(swapped)
    shapes = [leaf.shape for leaf in leaves]
    first = next(index for index, shape in enumerate(shapes) if shapes.count(shape) > 1 and leaves[index].any())
    second = next(
        index
        for index, shape in enumerate(shapes)
        if shape == shapes[first] and not np.array_equal(leaves[index], leaves[first])
    )
    leaves[first], leaves[second] = leaves[second], leaves[first]
    swapped = jax.tree.unflatten(tree, leaves)
    assert state_digest(swapped, step=0, data_position=0) != state_digest(state, step=0, data_position=0)
