"""Steps of one identity run once; the plan warns if their configs or functions are not the same."""

import functools
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.planning.graph import build_graph
from simpo_pipeline.executor.step import ExecutorStep, borrow, outside_path, this_output_path, versioned


@dataclass(frozen=True)
class Optimizer:
    lr: float = 0.1


@dataclass(frozen=True)
class Config:
    data: Any = None
    optimizer: Any = Optimizer()


@dataclass(frozen=True)
class WithFile:
    path: str = field(metadata=outside_path())
    size: int = 0


def work(config: Any) -> None:
    """Do nothing."""


def with_rate(rate: float):
    def train(config: Any) -> float:
        return rate

    return train


def with_default(default: Any):
    def train(config: Any, *, rate: Any = default) -> None: ...

    return train


def with_itself():
    def train(config: Any) -> Any:
        return train, never_set

    if len(__name__) < 0:
        never_set = None
    return train


@dataclass(eq=False)
class Callable:
    rate: float

    def __call__(self, config: Any) -> None: ...

    def train(self, config: Any) -> None: ...


class WithoutRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def warnings(*steps: ExecutorStep) -> tuple[str, ...]:
    return build_graph(steps, "/p").warnings


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (Config(versioned(1)), Config(versioned(1), Optimizer(0.2)), "optimizer.lr: 0.1 and 0.2"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a[1]: 2 and 3"),
        ({"a": 1}, {}, "a: 1 and absent"),
        (this_output_path("x"), this_output_path("y"), "name: 'x' and 'y'"),
        ({"api_key": "one"}, {"api_key": "two"}, "api_key: *** and ***"),
        (np.arange(3000), np.arange(3000) * (np.arange(3000) != 1500), "the config: "),
        ({"f": with_rate(1.0)}, {"f": with_rate(2.0)}, "f.rate: 1.0 and 2.0"),
    ],
)
def test_a_field_that_differs_without_being_versioned_is_named_with_both_values(one, other, text):
    (warning,) = warnings(ExecutorStep("train", work, one), ExecutorStep("train", work, other))
    assert "Two steps named 'train' have the same version, so only the first one runs" in warning
    assert text in warning
    assert "mark the values with versioned(...)" in warning


@pytest.mark.parametrize(
    "functions",
    [
        (work, with_rate(1.0)),
        (with_rate(1.0), with_rate(2.0)),
        [functools.partial(work, {"x": x}) for x in (1, 2)],
        (lambda config: 1, lambda config: 2),
        (lambda config: lambda: 1, lambda config: lambda: 2),
        (with_default(1), with_default(2)),
        (Callable(1.0), Callable(2.0)),
        (Callable(1.0).train, Callable(2.0).train),
    ],
)
def test_functions_that_differ_are_named_too(functions):
    (warning,) = warnings(*(ExecutorStep("train", function, None) for function in functions))
    assert "fn" in warning


def test_steps_that_are_the_same_or_have_different_versions_give_no_warning():
    first = ExecutorStep("first", work, Config(versioned(1), Optimizer()))
    again = ExecutorStep("first", work, Config(versioned(1), Optimizer()))
    nan = float("nan")
    users = [ExecutorStep("user", with_rate(1.0), [step, borrow(step), object(), nan]) for step in (first, again)]
    assert warnings(*users) == ()
    assert warnings(first, ExecutorStep("first", work, Config(versioned(2), Optimizer(0.5)))) == ()


def test_values_that_cannot_be_compared_are_no_error():
    endless: list[Any] = []
    endless.append(endless)
    for make in (with_itself, lambda: functools.partial(work, endless), lambda: with_default(WithoutRepr())):
        assert warnings(*(ExecutorStep("train", make(), [WithoutRepr()]) for _ in range(2))) == ()


def test_equal_files_with_different_names_give_no_warning(tmp_path):
    configs = [WithFile(str(tmp_path / name), size) for name, size in (("a.txt", 1), ("b.txt", 1), ("a.txt", 2))]
    for config in configs:
        Path(config.path).write_text("equal")
    one, renamed, other = (ExecutorStep("read", work, config) for config in configs)
    assert warnings(one, renamed) == ()
    assert "version: size: 1 and 2. If" in warnings(one, other)[0]


def test_a_plan_logs_the_warning(tmp_path, caplog):
    sweep = [ExecutorStep("train", work, {"lr": rate}) for rate in (0.1, 0.2, 0.3)]
    with caplog.at_level(logging.WARNING, "simpo_pipeline"):
        Executor(str(tmp_path)).run(sweep, dry_run=True)
    assert [message.split("version: ")[1].split(".  ")[0][:15] for message in caplog.messages] == [
        "lr: 0.1 and 0.2",
        "lr: 0.1 and 0.3",
    ]
