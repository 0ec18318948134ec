"""Schedules: pure expansion of `eval_at_steps` or `eval_every` into training phases and generations.

Steps count finished updates: an evaluation at step 2 uses the parameters after two updates, and an evaluation at the
last step uses the final parameters. Every evaluation happens exactly once.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from simpo_pipeline.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TrainingPhase:
    """Updates `start + 1 .. stop` of a run, and whether generation follows them."""

    start: int
    stop: int
    infer: bool

    @property
    def num_updates(self) -> int:
        return self.stop - self.start


def expand_schedule(
    num_train_steps: int, *, eval_at_steps: Sequence[int] | None = None, eval_every: int | None = None
) -> tuple[TrainingPhase, ...]:
    """Return the phases of a run of `num_train_steps` updates, in order.

    Args:
        num_train_steps: Number of updates of the whole run.
        eval_at_steps: Generate after exactly these updates. They may be in any order; duplicates count once.
        eval_every: Generate after every `eval_every` updates, and thus after the last update if it is a multiple.
            Ignored if `eval_at_steps` is given. If neither is given, the run is one phase without generation.

    Raises:
        ConfigError: A number is not positive, or an evaluation is after the end of the run.
    """
    if num_train_steps < 1:
        raise ConfigError(f"trainer.num_train_steps must be positive, got {num_train_steps}")
    stops = _eval_steps(num_train_steps, eval_at_steps, eval_every)
    bounds = [0, *stops] if num_train_steps in stops else [0, *stops, num_train_steps]
    return tuple(TrainingPhase(start, stop, infer=stop in stops) for start, stop in itertools.pairwise(bounds))


def _eval_steps(num_train_steps: int, eval_at_steps: Sequence[int] | None, eval_every: int | None) -> list[int]:
    if eval_at_steps is not None:
        for step in eval_at_steps:
            if step < 1:
                raise ConfigError(f"inference_eval.eval_at_steps must be positive, got {step}")
            if step > num_train_steps:
                raise ConfigError(
                    f"inference_eval.eval_at_steps has {step}, but the run has only {num_train_steps} updates; "
                    f"give steps from 1 to {num_train_steps}, or raise trainer.num_train_steps"
                )
        return sorted(set(eval_at_steps))
    if eval_every is not None:
        if eval_every < 1:
            raise ConfigError(
                f"inference_eval.eval_every must be positive when eval_at_steps is unset, got {eval_every}"
            )
        return list(range(eval_every, num_train_steps + 1, eval_every))
    return []
