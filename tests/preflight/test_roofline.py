"""Work and bounds against hand-computed counts."""

import pytest

from experiments.m11_interleave import LLAMA_3_1_8B
from simpo_pipeline.preflight.roofline import (
    ProgramWork,
    generation_work,
    kernel_seconds,
    kv_bytes_per_token,
    layer_parameters,
    roofline,
    train_work,
)
from simpo_pipeline.preflight.topology import V5P


def test_an_8b_model_has_the_published_numbers_of_parameters_and_cache_bytes():
    tables_and_norms = 2 * 128256 * 4096 + 65 * 4096
    assert 32 * layer_parameters(LLAMA_3_1_8B) + tables_and_norms == LLAMA_3_1_8B.num_parameters == 8_030_261_248
    assert kv_bytes_per_token(LLAMA_3_1_8B, 2) == 128 * 1024


def test_an_update_is_six_flops_per_parameter_and_token_and_remat_adds_two():
    # Short rows, so that attention is negligible; every token makes a prediction.
    update = train_work(LLAMA_3_1_8B, 1024, 16, 1024 * 16, "full", kernel=False)
    multiplied = LLAMA_3_1_8B.num_parameters - 128256 * 4096
    assert update.flops == pytest.approx(6 * multiplied * 1024 * 16, rel=1e-2)
    assert update.repeated_flops == pytest.approx(2 * 32 * layer_parameters(LLAMA_3_1_8B) * 1024 * 16, rel=1e-2)
    assert train_work(LLAMA_3_1_8B, 1024, 16, 1024 * 16, "none", kernel=False).repeated_flops == 0


def test_the_kernel_flops_of_an_update_grow_with_the_square_of_the_row_length():
    short, long = (train_work(LLAMA_3_1_8B, 2**20 // length, length, 8, "full", kernel=True) for length in (1024, 4096))
    assert long.kernel_flops == pytest.approx(4 * short.kernel_flops)


def test_a_decode_step_reads_all_weights_except_the_embedding_and_every_cached_token_once():
    turn = generation_work(LLAMA_3_1_8B, 32, 32, 32 * 1000, 1000, 2)
    weights = 2 * (LLAMA_3_1_8B.num_parameters - 128256 * 4096 - 65 * 4096)
    assert turn.hbm_bytes == weights + 128 * 1024 * 32 * 1001
    assert roofline(turn, V5P, 4, 0, 2).seconds == pytest.approx(turn.hbm_bytes / 4 / 2765e9)
    assert kernel_seconds(turn, V5P, 4) == pytest.approx(128 * 1024 * 32_000 / 4 / 2765e9)


def test_the_bound_is_the_slowest_part():
    bound = roofline(ProgramWork(flops=459e12, repeated_flops=459e12, hbm_bytes=2765e9), V5P, 2, 300e9, 3)
    assert (bound.compute_seconds, bound.hbm_seconds, bound.link_seconds) == pytest.approx((1.0, 0.5, 1.0))
    assert bound.seconds == pytest.approx(1.0)
