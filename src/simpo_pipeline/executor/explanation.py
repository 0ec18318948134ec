"""All that is known about one step of a plan: what it is made of, what the plan does with it, and why it is new."""

from dataclasses import dataclass
from typing import Any

from simpo_pipeline.executor.explain import (
    Difference,
    differences,
    recorded_config,
    shown_value,
    siblings_by_stem,
    stem_of,
)
from simpo_pipeline.executor.graph import Graph, Step
from simpo_pipeline.executor.order import Order
from simpo_pipeline.executor.parallel import in_parallel
from simpo_pipeline.executor.run import PlanRow
from simpo_pipeline.executor.table import format_table
from simpo_pipeline.storage.files import list_names
from simpo_pipeline.storage.paths import base_name, join, parent


@dataclass(frozen=True)
class Explanation:
    """One step of a plan, explained."""

    step_name: str
    action: str
    """As in the plan; NONE when the plan leaves the step out."""
    reason: str
    version: str
    """The whole hash of the identity, 64 hex digits."""
    output_path: str
    config: dict[str, Any]
    """What bears identity, by field path: versioned values and dependencies."""
    used_by: tuple[str, ...]
    others: dict[str, tuple[Difference, ...]]
    """How each version beside it differs: from what is recorded there to what the step is now."""

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        others = {name: [change.__dict__ for change in changes] for name, changes in self.others.items()}
        return {**self.__dict__, "used_by": list(self.used_by), "others": others}

    def text(self) -> str:
        """For a terminal."""
        lines = [
            f"{self.step_name}  {self.action}: {self.reason}",
            f"  output path  {self.output_path}",
            f"  version      {self.version}",
            f"  used by      {', '.join(self.used_by) or 'no step'}",
            "",
            "Its version is made of its name and of:",
            format_table(("field", "value"), [(path, shown_value(value)) for path, value in self.config.items()]),
        ]
        for name, changes in self.others.items():
            table = format_table(("field", "then", "now"), [(one.field_path, one.old, one.new) for one in changes])
            lines += ["", f"Since {name}:", table]
        if not self.others:
            lines += ["", "No other version of it lies beside it."]
        return "\n".join(lines)


def explain_step(graph: Graph, order: Order, step: Step, row: PlanRow | None) -> Explanation:
    """Reads the records of the other versions beside the step's output path."""
    path, identity = graph.output_paths[step], graph.identities[step]
    names = siblings_by_stem(list_names(parent(path))).get(stem_of(path), [])
    others = [join(parent(path), name) for name in names if name != base_name(path)]
    recorded = dict(zip(others, in_parallel(recorded_config, others), strict=True))
    config = identity.version["config"]
    return Explanation(
        step.name,
        row.action.value if row is not None else "NONE",
        row.reason if row is not None else "this run is not asked for it, and nothing it runs needs it",
        identity.hash,
        path,
        dict(sorted(config.items())),
        tuple(user.name for user in order.steps if any(edge.step is step for edge in graph.edges[user])),
        {base_name(other): tuple(differences(old, config)) for other, old in recorded.items() if old is not None},
    )
