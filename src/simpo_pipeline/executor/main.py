"""`executor_main`: what an experiment's script calls. Flags, log lines, tables and exit codes live here and only here.

exit 0   done; the last line is "Job finished with no error."
exit 1   something failed while the DAG ran
exit 2   a flag, the config or the DAG is wrong; nothing has run
"""

import logging
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, cast

from simpo_pipeline.errors import ConfigError, PathNotFoundError, PlanError, SimpoPipelineError, StepError, StorageError
from simpo_pipeline.executor.arguments import parse_arguments
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.lease import LeaseConfig
from simpo_pipeline.executor.processes import Processes
from simpo_pipeline.executor.rounds import StepResult
from simpo_pipeline.executor.step import ExecutorStep, InputName
from simpo_pipeline.executor.table import format_table, plan_table
from simpo_pipeline.storage.files import read_json
from simpo_pipeline.storage.paths import join

ConfigT = TypeVar("ConfigT")
_logger = logging.getLogger("simpo_pipeline")
SummaryColumns = Sequence[tuple[str, str]]
"""Pairs of a column's header and the key of its value in each step's summary.json."""


@dataclass(frozen=True)
class ExecutorMainConfig:
    """The flags every experiment has; an experiment adds its own by inheriting."""

    prefix: str | None = None
    """Folder or URL that all outputs go below; else MARIN_PREFIX, else ./runs."""
    executor_info_base_path: str | None = None
    """Where the record of the experiment goes; else {prefix}/experiments."""
    dry_run: bool = False
    """Print the plan and exit; nothing is written."""
    force_run_failed: bool = True
    """Run steps again that failed before; false blocks them."""
    run_only: list[str] | None = None
    """Run only the steps whose names match these regular expressions, and what they need."""
    max_concurrent: int | None = None
    """How many steps without live values may run at once."""
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    """How this job claims the steps it runs."""

    @property
    def effective_prefix(self) -> str:
        """`prefix`, else MARIN_PREFIX, else ./runs."""
        return self.prefix or os.environ.get("MARIN_PREFIX") or "runs"


def parse_main_config(config_class: type[ConfigT]) -> ConfigT:
    """The config in the command line; a bad one is told in one sentence, and the script exits with 2."""
    try:
        return parse_arguments(config_class, sys.argv[1:])
    except ConfigError as error:
        _exit_with_usage_error(error)


def executor_main(
    config: ExecutorMainConfig | None = None,
    *,
    steps: Sequence[ExecutorStep[Any] | InputName],
    description: str | None = None,
    session: Any = None,
    processes: Processes | None = None,
    summary_columns: SummaryColumns = (("tokens", "tokens"), ("tok/s", "tokens_per_second"), ("loss", "loss")),
) -> None:
    """Plan and run the steps as the flags say; leaves the script with exit code 1 or 2 when that does not go well.

    `config` is read from the command line when it is None. `session` is handed to every step that asks for its run; at
    the end its `close(error)` is called if it has one, unless this was a dry run.
    """
    config = config if config is not None else parse_main_config(ExecutorMainConfig)
    processes = processes or Processes()
    with _log_to_stdout():
        executor = _executor(config, description, session, processes)
        try:
            if config.dry_run:
                _run(executor, config, steps)
                _print_in_leader(processes, plan_table(executor.plan))
                return
            _run_and_close(executor, config, steps, session)
        except (ConfigError, PlanError) as error:
            _exit_with_usage_error(error)
        except SimpoPipelineError as error:
            if isinstance(error, StorageError) and not executor.results:
                _exit_with_usage_error(error)  # the prefix could not be read, so nothing was planned
            _print_results(executor.results, summary_columns, processes)
            _logger.error("The job failed.", exc_info=error)
            raise SystemExit(1) from error
        _print_results(executor.results, summary_columns, processes)
        _print_in_leader(processes, "Job finished with no error.")


def _executor(config: ExecutorMainConfig, description: str | None, session: Any, processes: Processes) -> Executor:
    prefix, info_path = config.effective_prefix, config.executor_info_base_path
    try:
        return Executor(prefix, info_path, description, session=session, processes=processes, lease=config.lease)
    except ConfigError as error:
        _exit_with_usage_error(error)


def _run(executor: Executor, config: ExecutorMainConfig, steps: Sequence[ExecutorStep[Any] | InputName]) -> None:
    executor.run(
        steps,
        dry_run=config.dry_run,
        run_only=config.run_only,
        force_run_failed=config.force_run_failed,
        max_concurrent=config.max_concurrent,
    )


def _run_and_close(
    executor: Executor, config: ExecutorMainConfig, steps: Sequence[ExecutorStep[Any] | InputName], session: Any
) -> None:
    close = getattr(session, "close", _close_nothing)
    try:
        _run(executor, config, steps)
    except BaseException as error:
        try:
            close(error)
        except Exception as close_error:  # must not hide what ended the job
            _logger.error("The session could not be closed either.", exc_info=close_error)
        raise
    try:
        close(None)
    except Exception as error:  # a tracker's own; the outputs are committed, but the job is not done well
        raise StepError(f"All steps ended well, but the session could not be closed: {error!r}") from error


def _close_nothing(error: BaseException | None) -> None:
    """For sessions without a `close`."""


def _exit_with_usage_error(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


@contextmanager
def _log_to_stdout() -> Generator[None]:
    """Show INFO and above with the time, while the block runs."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    level = _logger.level
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)


def _print_in_leader(processes: Processes, text: str) -> None:
    if processes.is_leader:
        print(text, flush=True)


def _print_results(results: Sequence[StepResult], columns: SummaryColumns, processes: Processes) -> None:
    """The table at the end; what a step wrote into summary.json fills the columns of that key."""
    if not processes.is_leader or not results:
        return
    rows: list[list[str]] = []
    for result in results:
        summary = _read_summary(result.output_path)
        cells = [_shown(summary.get(key)) for _, key in columns]
        seconds = f"{result.seconds:.1f}" if result.seconds is not None else ""
        rows.append([result.step_name, result.action, seconds, *cells, result.output_path])
    print(format_table(["step", "action", "seconds", *(name for name, _ in columns), "output path"], rows), flush=True)


def _read_summary(output_path: str) -> dict[str, Any]:
    try:
        summary = read_json(join(output_path, "summary.json"))
    except PathNotFoundError:
        return {}
    except StorageError as error:
        _logger.warning("the table lacks a step's summary: %s", error)
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
