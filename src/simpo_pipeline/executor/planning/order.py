"""In which order the steps run, and the rules of live values that decide it.

1. A live value has at most one taker.
2. Every borrower runs before the taker; the author does not write that edge, it is implied.
3. The steps that need no live value come first among what a step needs, so that live values are held shortly.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from simpo_pipeline.errors import LiveEdgeError, PlanError
from simpo_pipeline.executor.planning.graph import Graph, Step, depth_first_order
from simpo_pipeline.executor.planning.identity import EdgeKind


@dataclass(frozen=True)
class Order:
    """The runnable steps of a graph in the order they run, each after its `before`."""

    steps: tuple[Step, ...]
    implied: Mapping[Step, tuple[Step, ...]]
    """By taker, the borrowers it must wait for."""
    consumers: Mapping[Step, tuple[Step, ...]]
    """By producer, the steps that borrow or take its live value."""


def live_order(graph: Graph) -> Order:
    """The order of a graph's runnable steps.

    Raises:
        LiveEdgeError: two takers of one value, a step that takes what it also borrows, or a cycle that only exists
            because borrowers run before the taker.
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
            f"{error} A step that takes a live value waits for all steps that borrow it: let the borrowers not depend "
            "on the taker, or give them a step of their own to borrow from."
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
            f"{names} both take the live value of {producer.name!r}; it can have one owner only. Let one of "
            "them borrow it, or take it from the other."
        )
    takers[producer] = taker


def _before(graph: Graph, step: Step, implied: list[Step]) -> list[Step]:
    """What must have ended before a step: plain inputs, then borrowers of what it takes, then its live inputs."""
    saved = [edge.step for edge in graph.needs(step) if edge.kind is EdgeKind.SAVED]
    live = [edge.step for edge in graph.live_inputs(step)]
    return list(dict.fromkeys([*saved, *implied, *live]))


def _sinks_first(before: Mapping[Step, list[Step]]) -> list[Step]:
    """Beginning at the steps nobody waits for finishes one branch, with its live values, before the next."""
    waited_for = {step for steps in before.values() for step in steps}
    return sorted(before, key=lambda step: step in waited_for)
