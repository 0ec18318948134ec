"""The update compiled for four chips of a v5p on a machine without one: the traffic between them."""

import math
import re

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from simpo_pipeline.data.rows import RowShape
from simpo_pipeline.distributed.compilation_cache import opened_cache
from simpo_pipeline.distributed.mesh import DATA_AXIS, MODEL_AXIS
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.training.config import TrainerConfig
from simpo_pipeline.training.step import build_train_step

pytest.importorskip("libtpu", reason="the compiler for TPUs is not installed: it comes with the extra `tpu`")

MODEL = LlamaConfig(
    hidden_size=1024,
    intermediate_size=2048,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=8192,
    max_seq_len=1024,
    tie_word_embeddings=False,
)
RUN = TrainerConfig(
    num_train_steps=2, train_batch_size=8, train_seq_len=512, compute_dtype="bfloat16", remat="full", packing=True
)
# Exchanges of gradient shards, which are summed at their destination.
EXCHANGED = re.compile(r" all-to-all(?:-start)?\(")
# `name = type all-reduce(...)`, where the type may be a tuple.
ALL_REDUCE = re.compile(r"= (.+?) all-reduce(?:-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


@pytest.fixture(scope="module")
def v5p_devices():
    # jax writes cache entries for absent devices but cannot read them back.
    with pytest.MonkeyPatch.context() as patch, opened_cache(None):
        # Otherwise libtpu looks for the machine's metadata and for other processes that use a TPU.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield topologies.get_topology_desc(topology_name="v5p:2x2x1", platform="tpu").devices


def shape_on(num_groups):
    """Return a shape of one row of three pairs per device: no array has as many rows as the model has layers."""
    return RowShape(num_groups, 1536, num_groups, 512, slot_lens=(512, 512, 384))


def compiled(devices, tensor_parallel):
    """Return the text of the update and its number of exchanges; those in the loop over layers count once."""
    mesh = Mesh(np.array(devices).reshape(-1, tensor_parallel), (DATA_AXIS, MODEL_AXIS))
    program = build_train_step(Programs(), MODEL, RUN, mesh, shape_on(mesh.shape[DATA_AXIS]))
    text = program.as_text()
    return text, len(EXCHANGED.findall(text))


def all_reduced_shapes(text):
    """Return the shapes of all arrays that are all-reduced."""
    return [
        tuple(int(part) for part in shape.split(",") if part)
        for types in ALL_REDUCE.findall(text)
        for shape in SHAPE.findall(types)
    ]


@pytest.mark.slow
def test_no_weight_gradient_is_all_reduced_in_full(v5p_devices):
    text, num_exchanged = compiled(v5p_devices, 1)
    sizes = [math.prod(shape) for shape in all_reduced_shapes(text)]
    # The gradients of a layer's 7 matrices and of the unembedding.
    assert num_exchanged >= 8
    # Scales of norms and scalars are all-reduced; the smallest matrix has ten times as many elements.
    assert max(sizes) < 100_000, f"all-reduces of {sorted(sizes)[-5:]} elements"


@pytest.mark.slow
def test_no_weight_gradient_is_all_reduced_in_full_with_matrices_sharded_over_two_chips(v5p_devices):
    text, num_exchanged = compiled(v5p_devices, 2)
    assert num_exchanged >= 8
    # Compared by shape: hidden states, which the two chips do sum, may have as many elements as a matrix.
    shapes = {tuple(sorted(shape)) for shape in all_reduced_shapes(text)}
    attention = {(512, 1024), (1024, 1024), (4, 128, 1024), (8, 128, 1024)}
    of_a_table = {(4096, 512), (512, 4096), (8192, 512), (1024, 8192), (1024, 4096)}
    of_a_layer = attention | {(1024, 2048), (1024, 4096), (1024, 8192)}
    whole = of_a_layer | of_a_table | {tuple(sorted((4, *shape))) for shape in of_a_layer}
    assert not whole & shapes, f"all-reduces of {sorted(whole & shapes)}"
