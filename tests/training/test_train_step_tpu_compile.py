"""The update compiled for four chips of a v5p by a machine without one: what travels between them."""

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
# Parts of gradients that are exchanged, to be summed where they arrive.
EXCHANGED = re.compile(r" all-to-all(?:-start)?\(")
# `name = type all-reduce(...)`, the type perhaps a tuple.
ALL_REDUCE = re.compile(r"= (.+?) all-reduce(?:-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


@pytest.fixture(scope="module")
def v5p_devices():
    # jax writes entries for devices that are not here, and cannot read them again.
    with pytest.MonkeyPatch.context() as patch, opened_cache(None):
        # Else libtpu looks for the machine's metadata, and for other processes that hold a TPU.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield topologies.get_topology_desc(topology_name="v5p:2x2x1", platform="tpu").devices


def shape_on(num_groups):
    """One row of three pairs a device: no array has as many rows as the model has layers."""
    return RowShape(num_groups, 1536, num_groups, 512, slot_lens=(512, 512, 384))


def compiled(devices, tensor_parallel):
    """The update's text, and how many exchanges there are in it; those of the loop over layers are there once."""
    mesh = Mesh(np.array(devices).reshape(-1, tensor_parallel), (DATA_AXIS, MODEL_AXIS))
    program = build_train_step(Programs(), MODEL, RUN, mesh, shape_on(mesh.shape[DATA_AXIS]))
    text = program.as_text()
    return text, len(EXCHANGED.findall(text))


def summed_shapes(text):
    """The shapes of all that is summed whole."""
    return [
        tuple(int(part) for part in shape.split(",") if part)
        for types in ALL_REDUCE.findall(text)
        for shape in SHAPE.findall(types)
    ]


@pytest.mark.slow
def test_no_gradient_of_a_weight_is_summed_whole_on_every_chip(v5p_devices):
    text, num_exchanged = compiled(v5p_devices, 1)
    sizes = [math.prod(shape) for shape in summed_shapes(text)]
    # The gradients of a layer's 7 matrices and of the unembedding.
    assert num_exchanged >= 8
    # Norms' scales and scalars are; the smallest matrix has ten times as many numbers.
    assert max(sizes) < 100_000, f"all-reduces of {sorted(sizes)[-5:]} numbers"


@pytest.mark.slow
def test_nor_with_matrices_split_over_two_chips(v5p_devices):
    text, num_exchanged = compiled(v5p_devices, 2)
    assert num_exchanged >= 8
    # By shape: hidden states, which the two chips do sum, may have as many numbers as a matrix.
    shapes = {tuple(sorted(shape)) for shape in summed_shapes(text)}
    attention = {(512, 1024), (1024, 1024), (4, 128, 1024), (8, 128, 1024)}
    of_a_table = {(4096, 512), (512, 4096), (8192, 512), (1024, 8192), (1024, 4096)}
    of_a_layer = attention | {(1024, 2048), (1024, 4096), (1024, 8192)}
    whole = of_a_layer | of_a_table | {tuple(sorted((4, *shape))) for shape in of_a_layer}
    assert not whole & shapes, f"all-reduces of {sorted(whole & shapes)}"
