"""From what an experiment wrote to a graph: every step with its identity, its output path and whom it uses.

Pure: nothing is read from storage. Nothing recurses along the DAG, so its depth is not limited.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from simpo_pipeline.errors import PlanError
from simpo_pipeline.executor.planning.identity import Edge, EdgeKind, Identity, Markers, find_markers, identify
from simpo_pipeline.executor.step import ExecutorStep, InputName, get_executor_step
from simpo_pipeline.storage.paths import absolute, is_relative, join

Step = ExecutorStep[Any]


@dataclass(frozen=True)
class Graph:
    """The DAG behind the requested steps; of several steps with one identity and one output path, the first stands."""

    steps: tuple[Step, ...]
    """The distinct steps, each after all it uses."""
    canonical: Mapping[Step, Step]
    """For every step object of the experiment, the one in `steps` that stands for it."""
    identities: Mapping[Step, Identity]
    output_paths: Mapping[Step, str]
    edges: Mapping[Step, tuple[Edge, ...]]
    """By distinct step; the steps in the edges are distinct ones too."""
    runnable: frozenset[Step]
    """The distinct steps that are requested or that a runnable step needs; the others serve identities only."""

    def needs(self, step: Step) -> Iterator[Edge]:
        """The edges that must be served before the step can run."""
        return (edge for edge in self.edges[step] if edge.kind is not EdgeKind.PSEUDO)

    def live_inputs(self, step: Step) -> Iterator[Edge]:
        """The live values the step uses."""
        return (edge for edge in self.edges[step] if edge.kind in (EdgeKind.BORROW, EdgeKind.TAKE))


def build_graph(requested: Iterable[Step | InputName], prefix: str) -> Graph:
    """Everything reachable from the requested steps, identified and placed below `prefix`.

    Raises:
        IdentityError: a versioned value has no canonical form.
        PlanError: a cycle, two different steps with one output path, or a request that names no step.
    """
    roots = [get_executor_step(request) for request in requested]
    markers = _reach(roots)
    identities: dict[Step, Identity] = {}
    output_paths: dict[Step, str] = {}
    canonical: dict[Step, Step] = {}
    first: dict[tuple[str, str], Step] = {}
    for step in _dependency_order(roots, markers):
        identities[step] = identify(step.name, markers[step], identities)
        output_paths[step] = _output_path(step, identities[step], prefix)
        canonical[step] = first.setdefault((identities[step].hash, output_paths[step]), step)
    steps = tuple(first.values())
    edges = {step: tuple(_onto_canonical(markers[step].edges, canonical)) for step in steps}
    _check_output_paths({step: output_paths[step] for step in steps}, identities)
    runnable = _runnable({canonical[root] for root in roots}, edges)
    return Graph(steps, canonical, identities, output_paths, edges, runnable)


def _reach(roots: Iterable[Step]) -> dict[Step, Markers]:
    markers: dict[Step, Markers] = {}
    waiting = list(roots)
    while waiting:
        step = waiting.pop()
        if step not in markers:
            markers[step] = find_markers(step.config)
            waiting.extend(edge.step for edge in markers[step].edges)
    return markers


def _dependency_order(roots: Iterable[Step], markers: Mapping[Step, Markers]) -> list[Step]:
    return depth_first_order(roots, {step: [edge.step for edge in found.edges] for step, found in markers.items()})


def depth_first_order(roots: Iterable[Step], predecessors: Mapping[Step, Iterable[Step]]) -> list[Step]:
    """All steps reachable from `roots`, each after its predecessors, these in the order given.

    Raises:
        PlanError: a cycle; its steps are named in order.
    """
    order: list[Step] = []
    finished: set[Step] = set()
    for root in roots:
        path: dict[Step, Iterator[Step]] = {} if root in finished else {root: iter(predecessors[root])}
        while path:
            step, remaining = next(reversed(path.items()))
            following = next((before for before in remaining if before not in finished), None)
            if following is None:
                del path[step]
                finished.add(step)
                order.append(step)
            elif following in path:
                raise PlanError(_cycle_message(list(path), following))
            else:
                path[following] = iter(predecessors[following])
    return order


def _cycle_message(path: list[Step], repeated: Step) -> str:
    cycle = [step.name for step in path[path.index(repeated) :]] + [repeated.name]
    return f"The steps wait for each other in a cycle: {' after '.join(cycle)}. Remove one of these uses."


def _output_path(step: Step, identity: Identity, prefix: str) -> str:
    override = step.override_output_path
    if override is None:
        return join(prefix, f"{step.name}-{identity.short_hash}")
    return join(prefix, override) if is_relative(override) else absolute(override)


def _onto_canonical(edges: Iterable[Edge], canonical: Mapping[Step, Step]) -> Iterator[Edge]:
    for edge in edges:
        yield Edge(canonical[edge.step], edge.kind, edge.field_path, edge.sub_path)


def _check_output_paths(output_paths: Mapping[Step, str], identities: Mapping[Step, Identity]) -> None:
    """Refuse equal and nested output paths: one step's manifest would list the other's files."""
    by_path: dict[str, Step] = {}
    for step, path in output_paths.items():
        other = by_path.setdefault(path, step)
        if other is not step:
            raise PlanError(
                f"Two different steps, {other.name!r} ({identities[other].short_hash}) and {step.name!r} "
                f"({identities[step].short_hash}), have the output path {path!r}. Give one of them another name "
                "or path."
            )
    for path, step in by_path.items():
        parts = path.split("/")
        for length in range(1, len(parts)):
            outer = by_path.get("/".join(parts[:length]))
            if outer is not None:
                raise PlanError(
                    f"The output path {path!r} of step {step.name!r} lies inside that of step {outer.name!r}, "
                    f"{output_paths[outer]!r}. Give one of them another name or path."
                )


def _runnable(roots: Iterable[Step], edges: Mapping[Step, tuple[Edge, ...]]) -> frozenset[Step]:
    needs = {step: [edge.step for edge in found if edge.kind is not EdgeKind.PSEUDO] for step, found in edges.items()}
    return frozenset(depth_first_order(roots, needs))
