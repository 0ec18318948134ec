"""Which steps of a DAG a run is asked for, by name: run_only, until, force."""

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
    """What was asked of the executor besides the DAG."""

    wanted: frozenset[Step]
    """The steps asked for; others run only if one of these needs them."""
    forced: frozenset[Step] = frozenset()
    """The steps to run also if they are done, once."""
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
    """What is asked for: all steps, or those that `run_only` and `until` leave, and the forced ones.

    Args:
        run_only: regular expressions searched in step names.
        until: names of steps; they and what comes before them are left, with the borrowers that a taker waits for.
        force: names of steps to run also if they are done; they are asked for whatever the others say.

    Raises:
        PlanError: a name or an expression matches no step, or nothing is left.
    """
    wanted = set(order.steps)
    if run_only is not None:
        wanted &= {step for text in run_only for step in _matching(order, text)}
    if until is not None:
        wanted &= _with_all_before(
            graph, order, [step for name in until for step in named(graph, order, name, "until")]
        )
    forced = frozenset(step for name in force or () for step in named(graph, order, name, "force"))
    if order.steps and not wanted | forced:
        raise PlanError(
            f"run_only {list(run_only or ())} and until {list(until or ())} together leave no step. The steps are: "
            f"{_names(order)}."
        )
    return Selection(frozenset(wanted) | forced, forced, force_run_failed)


def _matching(order: Order, text: str) -> list[Step]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise PlanError(f"run_only got {text!r}, which is no regular expression: {error}.") from error
    matching = [step for step in order.steps if pattern.search(step.name)]
    if not matching:
        raise PlanError(f"run_only got {text!r}, which matches no step. The steps are: {_names(order)}.")
    return matching


def named(graph: Graph, order: Order, name: str, flag: str) -> list[Step]:
    """The steps of a name, or the one of `name-hash` as in its output path.

    Raises:
        PlanError: there is none; the nearest name is named.
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
    raise PlanError(f"--{flag} got {name!r}, which is the name of no step. {advice}")


def _names(order: Order) -> str:
    names = list(dict.fromkeys(step.name for step in order.steps))
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + more


def _with_all_before(graph: Graph, order: Order, last: Sequence[Step]) -> set[Step]:
    before = {step: [*(edge.step for edge in graph.needs(step)), *order.implied.get(step, ())] for step in order.steps}
    return set(depth_first_order(last, before))
