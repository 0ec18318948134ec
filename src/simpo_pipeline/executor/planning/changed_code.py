"""Comparison of the source of step functions with what the records of finished steps say about it."""

from typing import Any

from simpo_pipeline.errors import StorageError
from simpo_pipeline.executor.records.code import SourceFingerprints, changed_modules
from simpo_pipeline.executor.records.info import read_info


def changed_code(output_path: str, function: Any, fingerprints: SourceFingerprints) -> tuple[str, ...]:
    """Return the modules of a step function whose source changed since the step ran. Reads the record of the step."""
    try:
        recorded = read_info(output_path).get("code")
    except StorageError:
        return ()  # the comparison is only shown, so no plan depends on it
    return tuple(changed_modules(recorded, fingerprints.of(function)))


def with_changed_code(reason: str, step_name: str, modules: tuple[str, ...]) -> str:
    """Return the reason why a step does not run, with the modules that changed, if any."""
    if not modules:
        return reason
    return f"{reason}; code changed since it ran ({', '.join(modules)}): --force {step_name} runs it again"
