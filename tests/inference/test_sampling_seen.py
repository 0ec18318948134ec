import jax
import numpy as np
import pytest

from simpo_pipeline.inference.seen_tokens import is_seen, mark_seen, seen_bits, seen_words

VOCABS = (1, 31, 32, 33, 300)


def tokens_of(bits: np.ndarray) -> set[int]:
    return {token for token in range(len(bits) * 32) if int(bits[token // 32]) >> (token % 32) & 1}


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_host_sets_the_bits_of_the_given_tokens_and_no_others(vocab: int) -> None:
    tokens = np.random.default_rng(vocab).integers(0, vocab, 20)
    bits = seen_bits(tokens, vocab)
    assert bits.dtype == np.uint32 and bits.shape == (seen_words(vocab),)
    assert tokens_of(bits) == set(tokens.tolist())
    np.testing.assert_array_equal(bits, seen_bits(tokens.tolist(), vocab))
    assert not seen_bits([], vocab).any()


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_device_sets_the_same_bits_as_the_host(vocab: int) -> None:
    drawn = np.random.default_rng(vocab).integers(0, vocab, (50, 8), dtype=np.int32)
    drawn[:, 0] = vocab - 1
    alive = np.random.default_rng(vocab).random((50, 8)) < 0.7
    mark = jax.jit(mark_seen)
    seen = np.zeros((50, seen_words(vocab)), np.uint32)
    for column in range(8):
        seen = mark(seen, np.where(alive[:, column], drawn[:, column], (-1, 10**6)[column % 2]), alive[:, column])
    seen = np.asarray(seen)
    assert seen.dtype == np.uint32
    for row in range(50):
        np.testing.assert_array_equal(seen[row], seen_bits(drawn[row, alive[row]], vocab))
    marks = np.asarray(is_seen(jax.numpy.asarray(seen), vocab))
    assert [set(np.flatnonzero(row).tolist()) for row in marks] == [tokens_of(row) for row in seen]
