"""Write trl_simpo.json: the results of TRL's own SimPO loss for fixed log-probs and for fixed logits.

TRL needs torch, several GB that are not part of this project's environment; run this script in a separate one:

    python -m venv trl-env
    trl-env/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0
    trl-env/bin/python tests/golden/make_trl.py

`CPOTrainer.cpo_loss` and `CPOTrainer.get_batch_loss_metrics` are TRL's methods, called on a trainer object that has
only the settings they read; only the model is ours, a function that returns the stored logits. TRL's `simpo_gamma` is
absolute (beta * ratio); `cpo_alpha` is our `sft_weight`. Everything is float64.
"""

# torch and trl are not installed where pyright runs.
# pyright: reportMissingImports=false

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl_trainer import make_trainer

SETTINGS = [(2.0, 0.5), (2.5, 0.3), (10.0, 0.3), (1.0, 0.0), (0.1, 1.6)]
SMOOTHING, SFT_WEIGHT = 0.1, 0.7
PAIRS, SEQ, VOCAB = 6, 9, 13
IGNORED = -100


def from_logps(rng: np.random.Generator, beta: float, ratio: float, smoothing: float = 0.0) -> dict:
    chosen, rejected = (-rng.gamma(2.0, 0.7, size=PAIRS) for _ in range(2))
    losses, chosen_rewards, rejected_rewards = make_trainer(beta, ratio, smoothing).cpo_loss(
        torch.from_numpy(chosen), torch.from_numpy(rejected)
    )
    return {
        "beta": beta,
        "gamma_beta_ratio": ratio,
        "label_smoothing": smoothing,
        "chosen_logps": chosen.tolist(),
        "rejected_logps": rejected.tolist(),
        "losses": losses.tolist(),
        "chosen_rewards": chosen_rewards.tolist(),
        "rejected_rewards": rejected_rewards.tolist(),
    }


def from_logits(rng: np.random.Generator, beta: float, ratio: float, sft_weight: float = 0.0) -> dict:
    """Return a case from logits: rows 0..PAIRS-1 are the chosen responses, the rest the rejected ones.

    Prompts and padding are masked.
    """
    logits = rng.normal(scale=2.0, size=(2 * PAIRS, SEQ, VOCAB)).round(4)
    tokens = rng.integers(1, VOCAB, size=(2 * PAIRS, SEQ))
    response_starts = rng.integers(1, 4, size=2 * PAIRS)
    lengths = rng.integers(5, SEQ + 1, size=2 * PAIRS)
    position = np.arange(SEQ)
    is_response = (position >= response_starts[:, None]) & (position < lengths[:, None])
    labels = np.where(is_response, tokens, IGNORED)
    batch = {}
    for name, rows in (("chosen", slice(0, PAIRS)), ("rejected", slice(PAIRS, None))):
        batch[f"{name}_input_ids"] = torch.from_numpy(tokens[rows])
        batch[f"{name}_labels"] = torch.from_numpy(labels[rows])
        batch[f"{name}_attention_mask"] = torch.from_numpy((position < lengths[rows, None]).astype(np.int64))

    def model(*_args, **_kwargs):
        return SimpleNamespace(logits=torch.from_numpy(logits))

    loss, metrics = make_trainer(beta, ratio, sft_weight=sft_weight).get_batch_loss_metrics(model, batch)
    kept = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    found = {name: float(metrics[name]) for name in (*kept, "logps/rejected", *(["nll_loss"] if sft_weight else []))}
    return {
        "beta": beta,
        "gamma_beta_ratio": ratio,
        "sft_weight": sft_weight,
        "logits": logits.tolist(),
        "tokens": tokens.tolist(),
        "is_response": is_response.astype(int).tolist(),
        "metrics": {"loss": loss.item()} | found,
    }


def main() -> None:
    rng = np.random.default_rng(0)
    golden = {
        "made_with": {"trl": trl.__version__, "torch": torch.__version__},
        "from_logps": [from_logps(rng, beta, ratio) for beta, ratio in SETTINGS],
        "from_logits": from_logits(rng, 2.0, 0.5),
        "smoothed": [from_logps(rng, beta, ratio, SMOOTHING) for beta, ratio in SETTINGS],
        "with_sft": from_logits(rng, 2.0, 0.5, SFT_WEIGHT),
    }
    path = Path(__file__).with_name("trl_simpo.json")
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(f"wrote {path.name}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
