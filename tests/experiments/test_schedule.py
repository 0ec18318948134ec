"""A schedule expands to phases that cover the run once and evaluate exactly where requested."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.schedule import TrainingPhase, expand_schedule
from simpo_pipeline.errors import ConfigError


def test_m11_is_train_2_infer_train_5():
    assert expand_schedule(7, eval_at_steps=[2]) == (TrainingPhase(0, 2, infer=True), TrainingPhase(2, 7, infer=False))


def test_an_evaluation_at_the_last_step_happens_once_and_nothing_follows_it():
    assert expand_schedule(200, eval_every=50) == tuple(
        TrainingPhase(start, start + 50, infer=True) for start in (0, 50, 100, 150)
    )
    assert expand_schedule(7, eval_at_steps=[7]) == (TrainingPhase(0, 7, infer=True),)


def test_eval_at_steps_overrides_eval_every():
    assert expand_schedule(7, eval_at_steps=[2], eval_every=1) == expand_schedule(7, eval_at_steps=[2])


def test_without_evaluations_the_run_is_one_phase():
    assert expand_schedule(7) == (TrainingPhase(0, 7, infer=False),)
    assert expand_schedule(7, eval_every=10) == (TrainingPhase(0, 7, infer=False),)


@given(num_train_steps=st.integers(1, 60), data=st.data())
def test_phases_cover_every_update_once_and_evaluate_only_where_requested(num_train_steps, data):
    eval_at_steps = data.draw(st.lists(st.integers(1, num_train_steps)))
    phases = expand_schedule(num_train_steps, eval_at_steps=eval_at_steps)
    assert [update for s in phases for update in range(s.start + 1, s.stop + 1)] == [*range(1, num_train_steps + 1)]
    assert {s.stop for s in phases if s.infer} == set(eval_at_steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_steps": 0}, "num_train_steps must be positive, got 0"),
        ({"num_train_steps": 7, "eval_at_steps": [0]}, "eval_at_steps must be positive, got 0"),
        ({"num_train_steps": 7, "eval_at_steps": [8]}, "8, but the run has only 7"),
        ({"num_train_steps": 7, "eval_every": 0}, "eval_every must be positive"),
    ],
)
def test_an_impossible_schedule_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        expand_schedule(**arguments)
