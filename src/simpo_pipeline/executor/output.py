"""Text that an experiment prints: the plan, explanations and results, as tables or as one JSON object."""

import json
import logging
from collections.abc import Sequence
from typing import Any, cast

from simpo_pipeline.errors import PathNotFoundError, SimpoPipelineError, StorageError
from simpo_pipeline.executor.planning.explanation import Explanation
from simpo_pipeline.executor.run import Action, PlanRow
from simpo_pipeline.executor.running.rounds import StepResult
from simpo_pipeline.executor.table import format_table, plan_table
from simpo_pipeline.storage.files import read_json
from simpo_pipeline.storage.json_text import without_nan
from simpo_pipeline.storage.paths import join

_logger = logging.getLogger("simpo_pipeline")
FINISHED_LINE = "Job finished with no error."
SummaryColumns = Sequence[tuple[str, str]]
"""Pairs of a column header and the key of its value in each step's summary.json."""


def plan_text(plan: Sequence[PlanRow], *, as_json: bool) -> str:
    """Return the text of a plan, with one step per line, or its JSON object."""
    if not as_json:
        return plan_table(plan)
    pending = sum(row.action is not Action.SKIP for row in plan)
    rows = [
        {
            "step": row.step_name,
            "action": row.action.value,
            "reason": row.reason,
            "version": row.version,
            "output_path": row.output_path,
        }
        for row in plan
    ]
    return json_document({"pending": pending, "steps": rows})


def explanations_text(explanations: Sequence[Explanation], *, as_json: bool) -> str:
    """Return the text of all that is known about some steps of a plan, or its JSON object."""
    if as_json:
        return json_document({"steps": [explanation.as_json() for explanation in explanations]})
    return "\n\n".join(explanation.text() for explanation in explanations)


def results_text(
    results: Sequence[StepResult], columns: SummaryColumns, error: SimpoPipelineError | None, *, as_json: bool
) -> str:
    """Return the text of each step's result. A column shows the value of its key in the step's summary.json."""
    summaries = [_read_summary(result.output_path) for result in results]
    if as_json:
        rows = [
            {
                "step": result.step_name,
                "action": result.action,
                "seconds": result.seconds,
                "output_path": result.output_path,
                "summary": summary,
            }
            for result, summary in zip(results, summaries, strict=True)
        ]
        return json_document({"error": str(error) if error is not None else None, "steps": rows})
    header = ["step", "action", "seconds", *(name for name, _ in columns), "output path"]
    body = [_result_row(result, summary, columns) for result, summary in zip(results, summaries, strict=True)]
    lines = [format_table(header, body)] if results else []
    return "\n".join(lines if error is not None else [*lines, FINISHED_LINE])


def json_document(value: Any) -> str:
    """Return a value as indented JSON text."""
    return json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)


def _result_row(result: StepResult, summary: dict[str, Any], columns: SummaryColumns) -> list[str]:
    seconds = f"{result.seconds:.1f}" if result.seconds is not None else ""
    return [
        result.step_name,
        result.action,
        seconds,
        *(_shown(summary.get(key)) for _, key in columns),
        result.output_path,
    ]


def _read_summary(output_path: str) -> dict[str, Any]:
    try:
        summary = read_json(join(output_path, "summary.json"))
    except PathNotFoundError:
        return {}
    except StorageError as error:
        _logger.warning("could not read the summary of a step, so the table omits it: %s", error)
        return {}
    return cast(dict[str, Any], summary) if isinstance(summary, dict) else {}


def _shown(value: object) -> str:
    match value:
        case None:
            return ""
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case _:
            return ""
