"""Execution order of the steps, and the rules of live values that determine it.

1. A live value has at most one taker.
2. Every borrower runs before the taker. The author does not write this edge; it is implied.
3. A step's saved inputs run before its live inputs, so that live values are held for as short a time as possible.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from simpo_pipeline.errors import LiveEdgeError, PlanError
from simpo_pipeline.executor.planning.graph import Graph, Step, depth_first_order
from simpo_pipeline.executor.planning.identity import EdgeKind


@dataclass(frozen=True)
class Order:
    """The runnable steps of a graph in execution order."""

    steps: tuple[Step, ...]
    """Each step comes after all the steps it must wait for."""
    implied: Mapping[Step, tuple[Step, ...]]
    """The borrowers that each taker must wait for, by taker."""
    consumers: Mapping[Step, tuple[Step, ...]]
    """The steps that borrow or take a live value, by its producer."""


def live_order(graph: Graph) -> Order:
    """Return the execution order of a graph's runnable steps.

    Raises:
        LiveEdgeError: A value has two takers, a step both borrows and takes a value, or a cycle exists only because
            borrowers run before the taker.
    """
    borrowers, takers = _uses(graph)
    implied: dict[Step, list[Step]] = {}
    for producer, taker in takers.items():
        implied.setdefault(taker, []).extend(borrowers.get(producer, ()))
    before = {step: _before(graph, step, implied.get(step, [])) for step in graph.steps if step in graph.runnable}
    try:
        steps = depth_first_order(_sinks_first(before), before)
    except PlanError as error:
        raise LiveEdgeError(
            f"{error} A step that takes a live value waits for all steps that borrow it. Make the borrowers "
            "independent of the taker, or give them a separate step to borrow from."
        ) from error
    consumers = {producer: tuple(steps_using) for producer, steps_using in borrowers.items()}
    for producer, taker in takers.items():
        consumers[producer] = (*consumers.get(producer, ()), taker)
    return Order(tuple(steps), {taker: tuple(waited) for taker, waited in implied.items()}, consumers)


def _uses(graph: Graph) -> tuple[dict[Step, list[Step]], dict[Step, Step]]:
    borrowers: dict[Step, list[Step]] = {}
    takers: dict[Step, Step] = {}
    for step in graph.steps:
        if step not in graph.runnable:
            continue
        for edge in graph.live_inputs(step):
            if edge.kind is EdgeKind.BORROW and step not in borrowers.setdefault(edge.step, []):
                borrowers[edge.step].append(step)
            if edge.kind is EdgeKind.TAKE:
                _add_taker(takers, edge.step, step)
    for producer, taker in takers.items():
        if taker in borrowers.get(producer, ()):
            raise LiveEdgeError(
                f"Step {taker.name!r} both borrows and takes the live value of {producer.name!r}. Taking it is enough."
            )
    return borrowers, takers


def _add_taker(takers: dict[Step, Step], producer: Step, taker: Step) -> None:
    if producer in takers:
        names = f"{takers[producer].name!r} and {taker.name!r}"
        raise LiveEdgeError(
            f"{names} both take the live value of {producer.name!r}; it can have only one owner. Let one of "
            "them borrow it, or take it from the other."
        )
    takers[producer] = taker


def _before(graph: Graph, step: Step, implied: list[Step]) -> list[Step]:
    """Return the steps that must finish before `step`: saved inputs, borrowers of what it takes, then live inputs."""
    saved = [edge.step for edge in graph.needs(step) if edge.kind is EdgeKind.SAVED]
    live = [edge.step for edge in graph.live_inputs(step)]
    return list(dict.fromkeys([*saved, *implied, *live]))


def _sinks_first(before: Mapping[Step, list[Step]]) -> list[Step]:
    """Sort steps that no step waits for first, so that a branch and its live values finish before the next starts."""
    waited_for = {step for steps in before.values() for step in steps}
    return sorted(before, key=lambda step: step in waited_for)
