"""The code of step `report`."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from simpo_pipeline.errors import DataError
from simpo_pipeline.executor.records.info import read_info
from simpo_pipeline.executor.run import PlanRow, StepRun
from simpo_pipeline.storage.files import exists, list_files, read_json
from simpo_pipeline.storage.json_text import without_nan
from simpo_pipeline.storage.jsonl import read_jsonl
from simpo_pipeline.storage.paths import base_name, join
from simpo_pipeline.training.evaluation import EVALUATIONS_FILE, IntervalEstimate, accuracy_gain, margin_gain
from steps.bodies.line_chart import Chart, Series, layout_chart
from steps.report import ReportConfig

Row = dict[str, Any]

# Columns of the table of updates, in order, as metric name -> heading. Metrics that no update has are left out.
UPDATE_COLUMNS = {
    "step": "update",
    "loss": "loss",
    "rewards/chosen": "reward chosen",
    "rewards/rejected": "reward rejected",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "grad_norm": "grad norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tok/s",
    "step_seconds": "seconds",
}
# Rows of the table of each generation, as key of its summary -> label.
GENERATION_FIGURES = {
    "step": "parameters after update",
    "prompts": "prompts",
    "rows": "answers",
    "prompt_tokens": "prompt tokens",
    "generated_tokens": "generated tokens",
    "tokens_per_second": "generated tok/s",
    "handoff_seconds": "handoff, seconds",
    "handoff_bytes_copied": "handoff, bytes copied",
    "load_seconds": "load, seconds",
    "prefill_seconds": "prefill, seconds",
    "decode_seconds": "decode, seconds",
}
TIMING_PARTS = ("train_seconds", "handoff_seconds", "prefill_seconds", "decode_seconds")
# Titles of the charts, and their metrics. The margin has its own chart because it is much smaller than the rewards.
CURVES = {
    "Loss": {"loss": "loss"},
    "Reward margin": {"rewards/margins": "margin"},
    "Rewards": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
}
# Lines of the chart of held-out accuracy: the accuracy and its 95% confidence interval.
BOUNDS = {"accuracy": "value", "95% from": "low", "95% to": "high"}


def report(config: ReportConfig, run: StepRun) -> None:
    """Write `report.html`, `report.md` and `summary.json`. Only the leader writes.

    Raises:
        DataError: The rows of an output are missing.
        StorageError: An output cannot be read.
    """
    if not run.processes.is_leader:
        return
    names = {row.output_path: row.step_name for row in run.plan}
    phases = [_read_phase(path, names) for path in config.train_outputs]
    generations = [_read_generation(path, names, config.num_samples) for path in config.infer_outputs]
    updates = sorted((row for phase in phases for row in phase.updates), key=lambda row: row["step"])
    evaluations = _compare([row for phase in phases for row in phase.evaluations])
    page = {
        "title": config.title,
        "headline": _headline(updates, evaluations, generations),
        "plan": run.plan,
        "timings": [_read_timing(row) for row in run.plan],
        "timing_parts": TIMING_PARTS,
        "phases": phases,
        "updates": updates,
        "update_columns": {key: label for key, label in UPDATE_COLUMNS.items() if any(key in row for row in updates)},
        "evaluations": evaluations,
        "charts": _lay_out_charts(updates, evaluations, generations),
        "generations": generations,
        "generation_figures": GENERATION_FIGURES,
    }
    run.output.write_text("report.html", render("report.html.jinja", page))
    run.output.write_text("report.md", render("report.md.jinja", page))
    # The numbers of a run that diverged are not finite.
    run.output.write_json("summary.json", without_nan(_summarize(phases, updates, evaluations, generations)))


@dataclasses.dataclass(frozen=True)
class TrainedPhase:
    """Results of one training step."""

    name: str
    updates: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    summary: Row


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Evaluation of the weights after an update. The gains are None in the first evaluation of its pairs."""

    step: int
    pairs: int
    loss: float
    margin: float
    accuracy: IntervalEstimate
    first_accuracy: float
    """Accuracy in the first evaluation of the same pairs."""
    gain: IntervalEstimate | None
    margin_gain: IntervalEstimate | None


@dataclasses.dataclass(frozen=True)
class Generation:
    """Results of one generation step, with some of its rows."""

    name: str
    summary: Row
    samples: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Duration of one step when it ran, and its summary, which has the durations of its parts."""

    step_name: str
    seconds: float | None
    summary: Row


def _read_phase(path: str, names: dict[str, str]) -> TrainedPhase:
    updates = tuple(read_jsonl(join(path, "metrics.jsonl")))
    if not updates:
        raise DataError(f"{join(path, 'metrics.jsonl')} has no rows; expected one per update")
    evaluated = join(path, EVALUATIONS_FILE)
    evaluations = tuple(read_jsonl(evaluated)) if exists(evaluated) else ()
    return TrainedPhase(names.get(path, base_name(path)), updates, evaluations, read_json(join(path, "summary.json")))


def _compare(rows: Sequence[Row]) -> list[Evaluated]:
    """Return the evaluations in order, each with the gains since the first evaluation of the same pairs."""
    rows = sorted(rows, key=lambda row: row["step"])
    first: dict[Any, Row] = {}
    for row in rows:
        first.setdefault(_pairs_of(row), row)
    return [
        Evaluated(
            step=row["step"],
            pairs=row["pairs"],
            loss=row["loss"],
            margin=row["rewards/margins"],
            accuracy=IntervalEstimate(**row["accuracy"]),
            first_accuracy=before["accuracy"]["value"],
            gain=accuracy_gain(before["margins"], row["margins"]) if before is not row else None,
            margin_gain=margin_gain(before["margins"], row["margins"]) if before is not row else None,
        )
        for row in rows
        for before in [first[_pairs_of(row)]]
    ]


def _pairs_of(row: Row) -> tuple[int, str | None]:
    """Return what the evaluations of the same pairs have in common. Earlier releases recorded only their number."""
    return row["pairs"], row.get("pairs_digest")


def _read_generation(path: str, names: dict[str, str], num_samples: int) -> Generation:
    merged = [file.relative_path for file in list_files(path) if file.relative_path.startswith("all_hosts_merged_of_")]
    if len(merged) != 1:
        raise DataError(f"{path} has {len(merged)} files all_hosts_merged_of_*.jsonl; expected exactly one")
    rows = list(read_jsonl(join(path, merged[0])))
    return Generation(
        names.get(path, base_name(path)), read_json(join(path, "summary.json")), spread(rows, num_samples)
    )


def _read_timing(row: PlanRow) -> Timing:
    summary_path = join(row.output_path, "summary.json")
    summary = read_json(summary_path) if exists(summary_path) else {}
    info = read_info(row.output_path) if exists(join(row.output_path, ".executor_info")) else {}
    return Timing(row.step_name, info.get("seconds"), summary)


def spread(rows: Sequence[Row], count: int) -> tuple[Row, ...]:
    """Return at most `count` rows, evenly spaced, including the first."""
    count = min(count, len(rows))
    return tuple(rows[index * len(rows) // count] for index in range(count))


def _lay_out_charts(
    updates: Sequence[Row], evaluations: Sequence[Evaluated], generations: Sequence[Generation]
) -> list[Chart]:
    markers = [(one.summary["step"], one.name) for one in generations if "step" in one.summary]

    def series(key: str, name: str) -> Series:
        return Series(name, tuple((row["step"], row[key]) for row in updates if key in row))

    charts = [
        layout_chart(title, [series(key, name) for key, name in lines.items()], markers)
        for title, lines in CURVES.items()
    ]
    held_out = [
        Series(name, tuple((one.step, getattr(one.accuracy, bound)) for one in evaluations))
        for name, bound in BOUNDS.items()
    ]
    charts.append(layout_chart("Accuracy on held-out pairs", held_out, markers))
    return [chart for chart in charts if chart is not None]


def _headline(updates: Sequence[Row], evaluations: Sequence[Evaluated], generations: Sequence[Generation]) -> list[str]:
    """Return short phrases that summarize the run, for the top of the page."""
    words = [f"{len(updates)} updates"] if updates else []
    for key, name in (("loss", "loss"), ("rewards/margins", "margin")):
        values = [row[key] for row in updates if key in row]
        if values:
            words.append(f"{name} {show_number(values[0])} to {show_number(values[-1])}")
    if evaluations:
        last = evaluations[-1]
        words.append(f"held-out accuracy {show_number(last.first_accuracy)} to {show_number(last.accuracy.value)}")
    for one in generations:
        tokens, rate = one.summary.get("generated_tokens"), one.summary.get("tokens_per_second")
        words.append(f"{show_number(tokens)} tokens generated at {show_number(rate)} tok/s")
    return words


def _summarize(
    phases: Sequence[TrainedPhase],
    updates: Sequence[Row],
    evaluations: Sequence[Evaluated],
    generations: Sequence[Generation],
) -> Row:
    last = evaluations[-1] if evaluations else None
    return {
        "updates": len(updates),
        "final_loss": updates[-1].get("loss") if updates else None,
        "final_margin": updates[-1].get("rewards/margins") if updates else None,
        "held_out_accuracy": _as_row(last and last.accuracy),
        "held_out_accuracy_gain": _as_row(last and last.gain),
        "held_out_margin_gain": _as_row(last and last.margin_gain),
        "state_digests": {phase.name: phase.summary.get("state_digest") for phase in phases},
        "generated_tokens": sum(one.summary.get("generated_tokens", 0) for one in generations),
        "samples_shown": sum(len(one.samples) for one in generations),
    }


def _as_row(estimate: IntervalEstimate | None) -> Row | None:
    return None if estimate is None else dataclasses.asdict(estimate)


def render(template: str, page: Row) -> str:
    """Render one of the templates in `steps/templates`. HTML templates escape every value."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("steps"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.jinja",), default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": show_number, "printable": printable, "cell": markdown_cell, "fenced": fenced}
    environment.filters["estimate"] = show_estimate
    return environment.get_template(template).render(page)


def show_number(value: object) -> str:
    """Format a number with thousands separators and four significant digits; None becomes a dash."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def show_estimate(estimate: IntervalEstimate | None) -> str:
    """Format a value with its confidence interval; None becomes a dash."""
    if estimate is None:
        return show_number(None)
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def printable(text: str) -> str:
    """Replace control characters, which could control a terminal or break a page, by replacement characters."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\r\n", "\n"))


def markdown_cell(value: object) -> str:
    """Format a value as one line of a Markdown table cell, escaped so that it cannot end the cell or start markup."""
    line = " ".join(printable(str(value)).split())
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", line)


def fenced(text: str) -> str:
    """Return the text in a Markdown code block whose fence is longer than any fence in the text."""
    text = printable(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
