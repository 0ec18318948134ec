"""The JSON files that benchmarks write, one per workload."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent / "results"


def write_result(workload: str, result: Mapping[str, Any]) -> None:
    """Write the result of one workload to benchmarks/results/<workload>.json, replacing the last one."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{workload}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
