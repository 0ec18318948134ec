"""Values that a run's config refuses, and its interpretation of warm-up."""

import math

import pytest

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.training.config import OptimizerConfig, SimpoConfig, TrainerConfig


def trainer_config(**changes) -> TrainerConfig:
    return TrainerConfig(**{"num_train_steps": 7, "train_batch_size": 4, "train_seq_len": 16, **changes})


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (SimpoConfig, {"beta": 0.0}, r"simpo\.beta is 0\.0: give a finite number above 0"),
        (SimpoConfig, {"beta": math.nan}, r"simpo\.beta is nan"),
        (
            SimpoConfig,
            {"gamma_beta_ratio": -0.1},
            r"simpo\.gamma_beta_ratio is -0\.1: give a finite number of at",
        ),
        (OptimizerConfig, {"learning_rate": 0.0}, r"optimizer\.learning_rate is 0\.0"),
        (OptimizerConfig, {"learning_rate": math.inf}, r"optimizer\.learning_rate is inf"),
        (OptimizerConfig, {"weight_decay": -1.0}, r"optimizer\.weight_decay is -1\.0"),
        (OptimizerConfig, {"beta1": 1.0}, r"optimizer\.beta1 is 1\.0: give a number from 0 to 1 \(1 excluded\)"),
        (OptimizerConfig, {"beta2": -0.1}, r"optimizer\.beta2 is -0\.1"),
        (OptimizerConfig, {"epsilon": 0.0}, r"optimizer\.epsilon is 0\.0"),
        (OptimizerConfig, {"max_grad_norm": 0.0}, r"optimizer\.max_grad_norm is 0\.0"),
        (OptimizerConfig, {"warmup": -0.5}, r"optimizer\.warmup is -0\.5"),
        (
            OptimizerConfig,
            {"warmup": 1.5},
            r"optimizer\.warmup is 1\.5: give a fraction of the run below 1, or a",
        ),
        (
            OptimizerConfig,
            {"lr_schedule": "cosin"},
            r"lr_schedule is 'cosin': give one of cosine, linear, wsd, constant",
        ),
        (SimpoConfig, {"loss_type": "ipo"}, r"simpo\.loss_type is 'ipo': give one of sigmoid, hinge"),
        (SimpoConfig, {"label_smoothing": 0.5}, r"label_smoothing is 0\.5: give a number from 0 to below 0\.5"),
        (SimpoConfig, {"label_smoothing": 0.1, "loss_type": "hinge"}, r"only the sigmoid loss supports it"),
        (SimpoConfig, {"sft_weight": -1.0}, r"simpo\.sft_weight is -1\.0"),
        (SimpoConfig, {"z_loss_weight": math.nan}, r"simpo\.z_loss_weight is nan"),
        (OptimizerConfig, {"decay": 2.5}, r"optimizer\.decay is 2\.5: give a fraction of the run below 1, or a whole"),
        (OptimizerConfig, {"moment_dtype": "int8"}, r"moment_dtype is 'int8': give one of float32, bfloat16"),
        (OptimizerConfig, {"min_lr_ratio": 1.1}, r"optimizer\.min_lr_ratio is 1\.1: give a number from 0 to 1\."),
        (trainer_config, {"num_train_steps": 0}, r"num_train_steps is 0: give an integer of at least 1"),
        (trainer_config, {"train_batch_size": 0}, r"train_batch_size is 0"),
        (trainer_config, {"train_seq_len": 0}, r"train_seq_len is 0"),
        (trainer_config, {"train_seq_len": 1}, r"train_seq_len is 1: a position predicts the token after it"),
        (trainer_config, {"seed": -1}, r"seed is -1: give an integer from 0 to 2\*\*64 - 1"),
        (trainer_config, {"compute_dtype": "float16"}, r"compute_dtype is 'float16': give one of float32, bfloat16"),
        (trainer_config, {"grad_accumulation": 0}, r"grad_accumulation is 0: give an integer of at least 1"),
        (trainer_config, {"grad_accumulation": 3}, r"is 4 pairs and grad_accumulation 3: give a number of parts that"),
        (trainer_config, {"remat": "layers"}, r"remat is 'layers': give one of full, products, none"),
        (trainer_config, {"ema_decay": 1.0}, r"ema_decay is 1\.0: give a number from 0 to 1 \(1 excluded\)"),
        (
            trainer_config,
            {"optimizer": OptimizerConfig(warmup=3.0, lr_schedule="wsd", decay=5.0)},
            r"optimizer\.warmup is 3 and optimizer\.decay 5 updates of a run of 7: lower one of them",
        ),
        (trainer_config, {"logprob_chunk_size": 0}, r"logprob_chunk_size is 0"),
        (trainer_config, {"optimizer": OptimizerConfig(warmup=7.0)}, r"warmup is 7 updates of a run of 7"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("warmup", "num_train_steps", "warmup_steps"), [(0.0, 7, 0), (0.1, 7, 0), (0.5, 7, 3), (1.0, 7, 1), (3.0, 7, 3)]
)
def test_warmup_below_one_is_a_fraction_rounded_down_and_from_one_on_a_number_of_updates(
    warmup, num_train_steps, warmup_steps
):
    assert OptimizerConfig(warmup=warmup).warmup_steps(num_train_steps) == warmup_steps
