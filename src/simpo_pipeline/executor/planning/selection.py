"""Selection of the steps that a run executes, by name: run_only, until, force."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simpo_pipeline.errors import PlanError
from simpo_pipeline.executor.planning.graph import Graph, Step, depth_first_order
from simpo_pipeline.executor.planning.order import Order

_MAX_NAMES_SHOWN = 20


@dataclass(frozen=True)
class Selection:
    """The request to the executor, apart from the DAG."""

    selected: frozenset[Step]
    """Steps that match `run_only` and `until` (all runnable steps without these), and the forced ones.

    Other steps run only if one of these needs them.
    """
    forced: frozenset[Step] = frozenset()
    """The steps to run once even if they are done."""
    force_run_failed: bool = True


def select_steps(
    graph: Graph,
    order: Order,
    *,
    run_only: Sequence[str] | None,
    until: Sequence[str] | None,
    force: Sequence[str] | None,
    force_run_failed: bool,
) -> Selection:
    """Return the selected steps: those that match both `run_only` and `until`, and the forced ones.

    Args:
        run_only: Regular expressions that are searched in step names. None selects all steps.
        until: Names of steps. Selects these steps and all steps before them, including the borrowers that a taker
            waits for. None selects all steps.
        force: Names of steps to run even if they are done. They are selected regardless of the other arguments.

    Raises:
        PlanError: A name or an expression matches no step, or no step is selected.
    """
    selected = set(order.steps)
    if run_only is not None:
        selected &= {step for text in run_only for step in _matching(order, text)}
    if until is not None:
        selected &= _with_all_before(
            graph, order, [step for name in until for step in named(graph, order, name, "until")]
        )
    forced = frozenset(step for name in force or () for step in named(graph, order, name, "force"))
    if order.steps and not selected | forced:
        raise PlanError(
            f"run_only {list(run_only or ())} and until {list(until or ())} together select no step. The steps are: "
            f"{_names(order)}."
        )
    return Selection(frozenset(selected) | forced, forced, force_run_failed)


def _matching(order: Order, text: str) -> list[Step]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise PlanError(f"run_only got {text!r}, which is not a valid regular expression: {error}.") from error
    matching = [step for step in order.steps if pattern.search(step.name)]
    if not matching:
        raise PlanError(f"run_only got {text!r}, which matches no step. The steps are: {_names(order)}.")
    return matching


def named(graph: Graph, order: Order, name: str, flag: str) -> list[Step]:
    """Return the steps with the given name, or the step with the given `name-hash` as in its output path.

    Raises:
        PlanError: There is no such step. The message suggests the closest name.
    """
    labels: list[Callable[[Step], str]] = [
        lambda step: step.name,
        lambda step: f"{step.name}-{graph.identities[step].short_hash}",
    ]
    for label in labels:
        found = [step for step in order.steps if label(step) == name]
        if found:
            return found
    nearest = difflib.get_close_matches(name, [step.name for step in order.steps], n=1)
    advice = f"Did you mean {nearest[0]!r}?" if nearest else f"The steps are: {_names(order)}."
    raise PlanError(f"--{flag} got {name!r}, which is not the name of a step. {advice}")


def _names(order: Order) -> str:
    names = list(dict.fromkeys(step.name for step in order.steps))
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + more


def _with_all_before(graph: Graph, order: Order, last: Sequence[Step]) -> set[Step]:
    before = {step: [*(edge.step for edge in graph.needs(step)), *order.implied.get(step, ())] for step in order.steps}
    return set(depth_first_order(last, before))
