import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.inference.sampling import _BLOCK, SamplingRows, _inverse_cdf, draw_tokens

draw = jax.jit(draw_tokens)


def rows_of(num_rows: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> SamplingRows:
    return SamplingRows(
        temperature=jnp.full(num_rows, temperature, jnp.float32),
        top_p=jnp.full(num_rows, top_p, jnp.float32),
        seed=jnp.full(num_rows, seed, jnp.uint32),
        prompt_index=jnp.arange(num_rows, dtype=jnp.uint32),
        sample_index=jnp.zeros(num_rows, jnp.uint32),
    )


def drawn_from(logits: np.ndarray, sampling: SamplingRows, step: int = 0, position: int = 7) -> np.ndarray:
    positions = np.full(len(logits), position, np.int32)
    return np.asarray(draw(logits.astype(np.float32), sampling, np.uint32(step), positions))


def exact_probabilities(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The filtered distribution by its definition: sort, accumulate, cut, renormalise; float64."""
    probabilities = np.exp((logits - logits.max()) / temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros_like(probabilities)
    kept[order[before < top_p]] = probabilities[order[before < top_p]]
    return kept / kept.sum()


def chi_square_per_degree(counts: np.ndarray, probabilities: np.ndarray) -> float:
    possible = probabilities > 0
    expected = probabilities[possible] * counts.sum()
    return float(np.sum((counts[possible] - expected) ** 2 / expected) / max(possible.sum() - 1, 1))


@pytest.mark.parametrize(
    ("vocab", "spread", "temperature", "top_p"),
    [
        (11, 1.5, 1.0, 1.0),
        (11, 1.5, 0.5, 1.0),
        (11, 1.5, 1.0, 0.8),
        (40, 2.0, 1.7, 0.6),
        (400, 0.3, 1.0, 0.95),  # the nucleus is wider than the top tokens looked at first
        (400, 3.0, 0.7, 0.95),
    ],
)
def test_draws_follow_the_exact_filtered_distribution(
    vocab: int, spread: float, temperature: float, top_p: float
) -> None:
    num_draws = 20_000
    logits = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32) * spread
    tokens = drawn_from(np.broadcast_to(logits, (num_draws, vocab)), rows_of(num_draws, temperature, top_p))
    probabilities = exact_probabilities(logits.astype(np.float64), temperature, top_p)
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[probabilities == 0].sum() == 0
    # 1 on average; at 5 degrees of freedom or more, above 4 once in a thousand sets of draws. The draws are fixed.
    assert chi_square_per_degree(counts, probabilities) < 4.0


def test_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    logits = np.array([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, 3.0, 1.0]])
    assert drawn_from(logits, rows_of(2, temperature=0.0)).tolist() == [1, 0]


def test_a_tiny_top_p_is_greedy() -> None:
    logits = np.random.default_rng(0).normal(size=(64, 300))
    np.testing.assert_array_equal(drawn_from(logits, rows_of(64, top_p=1e-6)), logits.argmax(axis=-1))


def test_greedy_and_drawing_rows_share_a_batch_without_touching_each_other() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 500)).astype(np.float32)
    settings = [(0.0, 1.0), (1.0, 1.0), (1.0, 0.5), (2.0, 0.99), (0.3, 0.9), (5.0, 0.999)]
    alone = [drawn_from(logits, rows_of(6, *each))[row] for row, each in enumerate(settings)]
    mixed = rows_of(6)
    temperature, top_p = jnp.asarray(settings, jnp.float32).T
    mixed = SamplingRows(temperature, top_p, mixed.seed, mixed.prompt_index, mixed.sample_index)
    np.testing.assert_array_equal(drawn_from(logits, mixed), alone)


def test_a_token_depends_on_every_part_of_its_key() -> None:
    logits = np.zeros((400, 1000), np.float32)
    base = rows_of(400)
    tokens = drawn_from(logits, base)
    np.testing.assert_array_equal(tokens, drawn_from(logits, base))
    others = [
        drawn_from(logits, rows_of(400, seed=1)),
        drawn_from(logits, base, step=1),
        drawn_from(logits, base, position=8),
        drawn_from(logits, SamplingRows(base.temperature, base.top_p, base.seed, base.prompt_index, base.seed + 1)),
        np.roll(tokens, 1),  # another prompt index
    ]
    for other in others:
        assert np.mean(tokens == other) < 0.05


def test_a_token_of_no_weight_is_never_drawn() -> None:
    logits = np.full((2000, 600), -np.inf, np.float32)
    logits[:, [0, 255, 256, 511]] = 0.0
    tokens = drawn_from(logits, rows_of(2000))
    assert set(tokens.tolist()) == {0, 255, 256, 511}


def test_rounding_at_the_borders_of_blocks_never_draws_a_token_without_weight():
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((256, 20 * _BLOCK)) < 0.9, 0, rng.random((256, 20 * _BLOCK))).astype(np.float32)
    ends = np.cumsum(weights.reshape(256, 20, _BLOCK).sum(axis=-1, dtype=np.float32), axis=-1, dtype=np.float32)
    invert = jax.jit(_inverse_cdf)
    for block in range(19):
        border = ends[:, block] / ends[:, -1]
        for uniform in (np.nextafter(border, np.float32(0)), border, np.nextafter(border, np.float32(1))):
            drawn = np.asarray(invert(weights, uniform.astype(np.float32)))
            assert (weights[np.arange(256), drawn] > 0).all()
