"""Commands that inspect and clean up the files that the executor left below a prefix.

    python -m simpo_pipeline.executor status PREFIX [--json]           list every step with its status, holder and size
    python -m simpo_pipeline.executor gc PREFIX [--delete] [--json]    list files that no manifest names and no job uses

exit 0   success
exit 1   storage failed during a removal; the other items were removed
exit 2   bad usage, or a prefix that is empty or cannot be read; nothing was removed
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from simpo_pipeline.errors import ConfigError, StorageError
from simpo_pipeline.executor.commands.litter import find_litter, litter_text, removals_text, remove_litter
from simpo_pipeline.executor.commands.survey import read_survey, status_text

DONE, STORAGE_FAILED, BAD_USAGE = 0, 1, 2
_PROGRAM = "python -m simpo_pipeline.executor"


class _Parser(argparse.ArgumentParser):
    """Parser that raises a ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"Bad arguments: {message}. Run {_PROGRAM} --help to see them all.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        options = _parser().parse_args(arguments)
        if options.command == "status":
            print(status_text(read_survey(options.prefix), as_json=options.json))
            return DONE
        return _collect(options.prefix, delete=options.delete, as_json=options.json)
    except (ConfigError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROGRAM, description="Inspect and clean up the files that the executor left below a prefix.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    status = commands.add_parser("status", help="list every step with its status, age, holder and size")
    gc = commands.add_parser("gc", help="list, and with --delete remove, files that no manifest names and no job uses")
    gc.add_argument("--delete", action="store_true", help="remove the listed files")
    for command in (status, gc):
        command.add_argument("prefix", metavar="PREFIX", help="a folder or URL that experiments used as --prefix")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _collect(prefix: str, *, delete: bool, as_json: bool) -> int:
    survey = read_survey(prefix)
    items = find_litter(survey)
    if not delete:
        print(litter_text(survey.prefix, items, as_json=as_json))
        return DONE
    removals = remove_litter(survey.prefix, items)
    print(removals_text(survey.prefix, removals, as_json=as_json))
    failures = [removal for removal in removals if removal.failed]
    for removal in failures:
        print(f"error: {removal.why_left}", file=sys.stderr)
    return STORAGE_FAILED if failures else DONE


if __name__ == "__main__":
    sys.exit(main())
