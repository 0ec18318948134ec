"""JSON text. NaN and infinities have no place in it: other programs refuse to read a file that holds one."""

import json
import math
from collections.abc import Iterator
from typing import Any, cast

from simpo_pipeline.errors import DataError


def json_text(value: Any, path: str, *, indent: int | None = None) -> str:
    """Return a value as JSON text for the file at `path`, which is only named in errors.

    Raises:
        DataError: The value contains NaN, an infinity, or something else that JSON does not have. The message names the
            file and the key.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        found = _not_finite(value)
        if found is not None:
            key, number = found
            raise DataError(
                f"{key} is {number} and cannot be written to {path!r}: JSON has only finite numbers. Find out why the "
                "computation gave it; something before it has diverged."
            ) from error
        raise DataError(
            f"A value for {path!r} is not JSON: {error}. Give str, int, float, bool, list, dict."
        ) from error


def without_nan(value: Any) -> Any:
    """Return the value with NaN and infinities as text, for records that show them to people."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {key: without_nan(inner) for key, inner in cast(dict[Any, Any], value).items()}
        case list() | tuple():
            return [without_nan(inner) for inner in cast(list[Any], value)]
        case _:
            return value


def _not_finite(value: Any) -> tuple[str, float] | None:
    """Return the path and the value of the first number that is not finite, or None."""
    try:
        return next(_all_not_finite(value, ""), None)
    except RecursionError:
        return None  # it contains itself, which is the error to report


def _all_not_finite(value: Any, path: str) -> Iterator[tuple[str, float]]:
    match value:
        case float() if not math.isfinite(value):
            yield path or "the value", value
        case dict():
            for key, inner in cast(dict[Any, Any], value).items():
                yield from _all_not_finite(key, f"the key {key!r}")
                yield from _all_not_finite(inner, f"{path}.{key}" if path else str(key))
        case list() | tuple():
            for index, inner in enumerate(cast(list[Any], value)):
                yield from _all_not_finite(inner, f"{path}[{index}]")
        case _:
            pass
