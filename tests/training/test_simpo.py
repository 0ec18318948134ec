"""The loss against numpy, and against TRL's own code on the same numbers (golden/make_trl.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.training.config import SimpoConfig
from simpo_pipeline.training.simpo import average_logps, simpo_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl_simpo.json").read_text())
TOLERANCE = 1e-6


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_logps_and_mask(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """Of each position's next token, float64 [rows, seq]; the last position predicts nothing."""
    logits, tokens = np.array(case["logits"]), np.array(case["tokens"])
    targets = np.roll(tokens, -1, axis=1)
    logps = np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    mask = np.roll(np.array(case["is_response"], dtype=np.float64), -1, axis=1)
    mask[:, -1] = 0.0
    return logps, mask


def ours(chosen: np.ndarray, rejected: np.ndarray, config: SimpoConfig) -> dict[str, float]:
    loss, metrics = simpo_loss(jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32), config)
    assert float(loss) == float(metrics["loss"])
    return {name: float(value) for name, value in metrics.items()}


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
        chosen_x64, rejected_x64 = jnp.split(average_logps(jnp.asarray(logps), jnp.asarray(mask)), 2)
        _, metrics = simpo_loss(chosen_x64, rejected_x64, SimpoConfig(beta=beta, gamma_beta_ratio=ratio))
        got = {name: float(value) for name, value in metrics.items()}
    assert got == pytest.approx(expected, abs=1e-12)


def test_metrics_from_logits_equal_trl():
    case = GOLDEN["from_logits"]
    logps, mask = token_logps_and_mask(case)
    averages = average_logps(jnp.asarray(logps, jnp.float32), jnp.asarray(mask, jnp.float32))
    chosen, rejected = np.split(np.asarray(averages), 2)
    config = SimpoConfig(beta=case["beta"], gamma_beta_ratio=case["gamma_beta_ratio"])
    assert ours(chosen, rejected, config) == pytest.approx(case["metrics"], abs=2 * TOLERANCE)


@pytest.mark.parametrize("case", GOLDEN["from_logps"], ids=lambda case: f"{case['beta']}-{case['gamma_beta_ratio']}")
def test_losses_and_rewards_of_each_pair_equal_trl(case):
    config = SimpoConfig(beta=case["beta"], gamma_beta_ratio=case["gamma_beta_ratio"])
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
    loss, gradient = jax.value_and_grad(lambda chosen: simpo_loss(chosen, logps[1], SimpoConfig(beta=10.0))[0])(
        logps[0]
    )
    assert float(loss) == pytest.approx(10.0 * (1e4 + 0.5))
    assert float(gradient[0]) == pytest.approx(-10.0)


def test_an_empty_response_averages_to_zero_and_has_no_gradient():
    logps = jnp.asarray([[-1.0, -2.0], [-3.0, -4.0]], jnp.float32)
    mask = jnp.asarray([[0.0, 0.0], [1.0, 0.0]], jnp.float32)
    averages, pull_back = jax.vjp(lambda logps: average_logps(logps, mask), logps)
    (gradient,) = pull_back(jnp.ones_like(averages))
    np.testing.assert_array_equal(averages, [0.0, -3.0])
    np.testing.assert_array_equal(gradient, [[0.0, 0.0], [1.0, 0.0]])
