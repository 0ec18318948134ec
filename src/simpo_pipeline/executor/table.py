"""Plain-text tables for a terminal."""

from collections.abc import Iterable, Sequence

from simpo_pipeline.executor.run import PlanRow


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format aligned columns under a header. Columns that contain only numbers and empty cells are right-aligned."""
    body = [list(row) for row in rows]
    columns = list(zip(header, *body, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [bool(body) and all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = [list(header), ["-" * width for width in widths], *body]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return cell == "" or cell.replace(",", "").replace(".", "", 1).removeprefix("-").replace("e-", "").isdigit()


def plan_table(rows: Iterable[PlanRow]) -> str:
    """Format a plan with one step per line."""
    header = ("step", "action", "reason", "version", "output path")
    return format_table(header, ((row.step_name, row.action, row.reason, row.version, row.output_path) for row in rows))
