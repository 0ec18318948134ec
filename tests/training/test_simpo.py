"""The loss against numpy, and against TRL's own code on the same inputs (golden/make_trl.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.training.config import SimpoConfig
from simpo_pipeline.training.simpo import simpo_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl_simpo.json").read_text())
TOLERANCE = 1e-6


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_logps_and_mask(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probs and mask of each position's next token, float64 [rows, seq]; the last one predicts nothing."""
    logits, tokens = np.array(case["logits"]), np.array(case["tokens"])
    targets = np.roll(tokens, -1, axis=1)
    logps = np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    mask = np.roll(np.array(case["is_response"], dtype=np.float64), -1, axis=1)
    mask[:, -1] = 0.0
    return logps, mask


def ours(chosen: np.ndarray, rejected: np.ndarray, config: SimpoConfig) -> dict[str, float]:
    return mean_of(jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32), config)


def mean_of(chosen: jax.Array, rejected: jax.Array, config: SimpoConfig) -> dict[str, float]:
    loss, metrics = simpo_loss(chosen, rejected, config, jnp.full(chosen.shape, 1 / chosen.size, chosen.dtype))
    return {name: float(value) for name, value in {**metrics, "loss": loss}.items()}


def test_every_metric_equals_a_direct_numpy_computation_from_logits():
    case = GOLDEN["from_logits"]
    logps, mask = token_logps_and_mask(case)
    beta, ratio = 2.0, 0.5
    averages = (logps * mask).sum(axis=1) / mask.sum(axis=1)
    chosen, rejected = np.split(averages, 2)
    margin = chosen - rejected
    expected = {
        "loss": np.mean(np.log1p(np.exp(-beta * (margin - ratio)))),
        "rewards/chosen": np.mean(beta * chosen),
        "rewards/rejected": np.mean(beta * rejected),
        "rewards/margins": np.mean(beta * margin),
        "rewards/accuracies": np.mean(chosen > rejected),
        "logps/chosen": np.mean(chosen),
        "logps/rejected": np.mean(rejected),
    }
    with jax.enable_x64(True):
        config = SimpoConfig(beta=beta, gamma_beta_ratio=ratio)
        got = mean_of(jnp.asarray(chosen), jnp.asarray(rejected), config)
    assert got == pytest.approx(expected, abs=1e-12)


def test_metrics_from_logits_equal_trl():
    case = GOLDEN["from_logits"]
    logps, mask = token_logps_and_mask(case)
    chosen, rejected = np.split((logps * mask).sum(axis=1) / mask.sum(axis=1), 2)
    config = SimpoConfig(beta=case["beta"], gamma_beta_ratio=case["gamma_beta_ratio"])
    assert ours(chosen, rejected, config) == pytest.approx(case["metrics"], abs=2 * TOLERANCE)


def test_the_sft_term_and_its_weight_are_trls_nll_loss_and_cpo_alpha():
    case = GOLDEN["with_sft"]
    logps, mask = token_logps_and_mask(case)
    chosen, rejected = np.split((logps * mask).sum(axis=1) / mask.sum(axis=1), 2)
    pairs = len(chosen)
    sft = -(logps * mask)[:pairs].sum() / mask[:pairs].sum()
    assert sft == pytest.approx(case["metrics"]["nll_loss"], abs=TOLERANCE)
    preference = ours(chosen, rejected, SimpoConfig(beta=case["beta"], gamma_beta_ratio=case["gamma_beta_ratio"]))
    assert preference["loss"] + case["sft_weight"] * sft == pytest.approx(case["metrics"]["loss"], abs=2 * TOLERANCE)


@pytest.mark.parametrize(
    "case",
    GOLDEN["from_logps"] + GOLDEN["smoothed"],
    ids=lambda case: f"{case['beta']}-{case['gamma_beta_ratio']}-{case['label_smoothing']}",
)
def test_losses_and_rewards_of_each_pair_equal_trl(case):
    config = SimpoConfig(**{name: case[name] for name in ("beta", "gamma_beta_ratio", "label_smoothing")})
    for pair, (chosen, rejected) in enumerate(zip(case["chosen_logps"], case["rejected_logps"], strict=True)):
        metrics = ours(np.array([chosen]), np.array([rejected]), config)
        assert metrics["loss"] == pytest.approx(case["losses"][pair], rel=TOLERANCE, abs=TOLERANCE)
        assert metrics["rewards/chosen"] == pytest.approx(case["chosen_rewards"][pair], rel=TOLERANCE)
        assert metrics["rewards/rejected"] == pytest.approx(case["rejected_rewards"][pair], rel=TOLERANCE)


def test_equal_responses_cost_softplus_of_gamma_and_count_as_wrong():
    equal = np.array([-1.5, -0.25])
    metrics = ours(equal, equal, SimpoConfig(beta=1.0, gamma_beta_ratio=0.5))
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp(0.5)), abs=TOLERANCE)
    assert metrics["rewards/accuracies"] == 0.0


def test_a_margin_below_gamma_still_counts_as_accurate():
    metrics = ours(np.array([-1.0]), np.array([-1.1]), SimpoConfig(beta=1.0, gamma_beta_ratio=0.5))
    assert metrics["rewards/accuracies"] == 1.0


def test_huge_margins_stay_finite_with_their_gradient():
    logps = jnp.asarray([-1e4], jnp.float32), jnp.asarray([0.0], jnp.float32)
    one = jnp.ones(1, jnp.float32)
    loss, gradient = jax.value_and_grad(lambda chosen: simpo_loss(chosen, logps[1], SimpoConfig(beta=10.0), one)[0])(
        logps[0]
    )
    assert float(loss) == pytest.approx(10.0 * (1e4 + 0.5))
    assert float(gradient[0]) == pytest.approx(-10.0)


def test_smoothing_treats_that_fraction_of_pairs_as_swapped():
    chosen, rejected = np.array([-1.0, -2.0]), np.array([-1.5, -0.5])
    right, wrong = (
        ours(*sides, SimpoConfig(gamma_beta_ratio=0.0))["loss"] for sides in ((chosen, rejected), (rejected, chosen))
    )
    smoothed = ours(chosen, rejected, SimpoConfig(gamma_beta_ratio=0.0, label_smoothing=0.2))["loss"]
    assert smoothed == pytest.approx(0.8 * right + 0.2 * wrong, rel=1e-6)


def test_the_hinge_loss_is_zero_beyond_its_margin():
    config = SimpoConfig(beta=2.0, gamma_beta_ratio=0.5, loss_type="hinge")
    assert ours(np.array([0.0]), np.array([-1.5]), config)["loss"] == 0.0
    assert ours(np.array([0.0]), np.array([-0.75]), config)["loss"] == pytest.approx(0.5)


def test_pairs_with_zero_weight_are_ignored():
    chosen, rejected = jnp.asarray([-1.0, -7.0], jnp.float32), jnp.asarray([-2.0, -3.0], jnp.float32)
    loss, metrics = simpo_loss(chosen, rejected, SimpoConfig(), jnp.asarray([1.0, 0.0], jnp.float32))
    alone = mean_of(chosen[:1], rejected[:1], SimpoConfig())
    assert {name: float(value) for name, value in {**metrics, "loss": loss}.items()} == alone
