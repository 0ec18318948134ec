"""Graph of an experiment: every step with its identity, its output path and the steps it uses.

Nothing is read from storage but the checksums of files that no step wrote (outside.py). No function recurses along the
DAG, so its depth is not limited.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from simpo_pipeline.errors import PlanError
from simpo_pipeline.executor.planning.identity import Edge, EdgeKind, Identity, Markers, find_markers, identify
from simpo_pipeline.executor.planning.merging import merge_warnings
from simpo_pipeline.executor.step import ExecutorStep, InputName, get_executor_step
from simpo_pipeline.storage.paths import absolute, is_relative, join

Step = ExecutorStep[Any]


@dataclass(frozen=True)
class Graph:
    """The DAG of the requested steps.

    Steps that have the same identity and the same output path are merged: the first one represents them all.
    """

    steps: tuple[Step, ...]
    """The distinct steps, each after all steps it uses."""
    canonical: Mapping[Step, Step]
    """Maps every step object of the experiment to the one in `steps` that represents it."""
    identities: Mapping[Step, Identity]
    output_paths: Mapping[Step, str]
    edges: Mapping[Step, tuple[Edge, ...]]
    """The edges of each distinct step. They refer to distinct steps, too."""
    files: Mapping[Step, Mapping[str, str]]
    """The files that no step wrote and whose content is in the identity of each distinct step, by field path."""
    warnings: tuple[str, ...]
    """One for each step that stands for others whose configs differ from its own."""
    runnable: frozenset[Step]
    """The distinct steps that are requested or that a runnable step needs. The others only contribute to identities."""

    def needs(self, step: Step) -> Iterator[Edge]:
        """Return the edges that must be satisfied before the step can run."""
        return (edge for edge in self.edges[step] if edge.kind is not EdgeKind.PSEUDO)

    def live_inputs(self, step: Step) -> Iterator[Edge]:
        """Return the edges through which the step uses live values."""
        return (edge for edge in self.edges[step] if edge.kind in (EdgeKind.BORROW, EdgeKind.TAKE))


def build_graph(requested: Iterable[Step | InputName], prefix: str) -> Graph:
    """Return the graph of all steps reachable from the requested ones, with their output paths below `prefix`.

    Raises:
        IdentityError: A versioned value has no canonical form.
        PlanError: The steps form a cycle, the output paths of two different steps are equal or nested, or a request
            does not refer to a step.
        StorageError: A file that no step wrote cannot be read.
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
    files = {step: markers[step].files for step in steps}
    warnings = tuple(merge_warnings(canonical, files))
    return Graph(steps, canonical, identities, output_paths, edges, files, warnings, runnable)


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
    """Return all steps reachable from `roots`, each after its predecessors, visited in the given order.

    Raises:
        PlanError: The steps form a cycle. The message names them in order.
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
    return f"The steps wait for each other in a cycle: {' after '.join(cycle)}. Remove one of these dependencies."


def _output_path(step: Step, identity: Identity, prefix: str) -> str:
    override = step.override_output_path
    if override is None:
        return join(prefix, f"{step.name}-{identity.short_hash}")
    return join(prefix, override) if is_relative(override) else absolute(override)


def _onto_canonical(edges: Iterable[Edge], canonical: Mapping[Step, Step]) -> Iterator[Edge]:
    for edge in edges:
        yield Edge(canonical[edge.step], edge.kind, edge.field_path, edge.sub_path)


def _check_output_paths(output_paths: Mapping[Step, str], identities: Mapping[Step, Identity]) -> None:
    """Reject equal and nested output paths, where the manifest of one step would list the files of the other."""
    by_path: dict[str, Step] = {}
    for step, path in output_paths.items():
        other = by_path.setdefault(path, step)
        if other is not step:
            raise PlanError(
                f"Two different steps, {other.name!r} ({identities[other].short_hash}) and {step.name!r} "
                f"({identities[step].short_hash}), have the same output path {path!r}. Give one of them a "
                "different name or output path."
            )
    for path, step in by_path.items():
        parts = path.split("/")
        for length in range(1, len(parts)):
            outer = by_path.get("/".join(parts[:length]))
            if outer is not None:
                raise PlanError(
                    f"The output path {path!r} of step {step.name!r} is inside that of step {outer.name!r}, "
                    f"{output_paths[outer]!r}. Give one of them a different name or output path."
                )


def _runnable(roots: Iterable[Step], edges: Mapping[Step, tuple[Edge, ...]]) -> frozenset[Step]:
    needs = {step: [edge.step for edge in found if edge.kind is not EdgeKind.PSEUDO] for step, found in edges.items()}
    return frozenset(depth_first_order(roots, needs))
