"""Entry point of an experiment's script: `executor_main`.

Only this module handles the flags, log lines, tables and exit codes of an experiment.

exit 0   success; the last line is "Job finished with no error."
exit 1   something failed while the DAG ran
exit 2   a flag, the config or the DAG is invalid, or the prefix cannot be used; nothing has run
exit 3   --dry_run --exit_code: the plan has work to do
"""

import io
import logging
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from simpo_pipeline.errors import ConfigError, PlanError, SimpoPipelineError, StepError, StorageError
from simpo_pipeline.executor.arguments import parse_arguments
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.output import SummaryColumns, explanations_text, plan_text, results_text
from simpo_pipeline.executor.records.lease import LeaseConfig
from simpo_pipeline.executor.run import Action
from simpo_pipeline.executor.step import ExecutorStep, InputName
from simpo_pipeline.processes import Processes

ConfigT = TypeVar("ConfigT")
_logger = logging.getLogger("simpo_pipeline")
FAILED, BAD_USAGE, PENDING = 1, 2, 3
_STDOUT, _STDERR = 1, 2


@dataclass(frozen=True)
class ExecutorMainConfig:
    """Flags that every experiment has. An experiment adds its own flags in a subclass."""

    prefix: str | None = None
    """Folder or URL below which all outputs are written; by default MARIN_PREFIX if set, otherwise ./runs."""
    executor_info_base_path: str | None = None
    """Folder or URL for the record of the experiment; by default {prefix}/experiments."""
    dry_run: bool = False
    """Print the plan and exit. Nothing is written."""
    force_run_failed: bool = True
    """Run steps again that failed before; false blocks these steps."""
    run_only: list[str] | None = None
    """Run only the steps whose names match these regular expressions, and the steps they need."""
    until: list[str] | None = None
    """Run only the steps with these names, and the steps before them."""
    force: list[str] | None = None
    """Run the steps with these names even if they are done."""
    explain: list[str] | None = None
    """Print what the steps with these names consist of and why they are new, and exit. Nothing is written."""
    max_concurrent: int | None = None
    """Maximum number of steps without live values that run at the same time."""
    json: bool = False
    """Print the plan, or the results, as one JSON object to standard output. Log lines go to standard error."""
    exit_code: bool = False
    """With --dry_run: exit with 3 if the plan has work to do, with 0 if everything is done."""
    unsafe_locks: bool = False
    """Allow a prefix on a file system without conditional writes, where two jobs may run the same step at once."""
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    """Settings of the leases with which this job claims the steps that it runs."""

    def __post_init__(self) -> None:
        if self.exit_code and not self.dry_run:
            raise ConfigError("--exit_code reports whether a plan has work to do. Use it together with --dry_run.")

    @property
    def effective_prefix(self) -> str:
        """`prefix` if set, otherwise MARIN_PREFIX if set, otherwise ./runs."""
        return self.prefix or os.environ.get("MARIN_PREFIX") or "runs"


def parse_main_config(config_class: type[ConfigT]) -> ConfigT:
    """Return the config from the command line. If it is invalid, print one sentence and exit with 2."""
    with usage_errors_reported():
        return parse_arguments(config_class, sys.argv[1:])


@contextmanager
def usage_errors_reported() -> Generator[None]:
    """Report a ConfigError raised in the block as one sentence, and exit with 2. Use it to evaluate a command line."""
    try:
        yield
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
    """Plan and run the steps according to the flags. Exit with code 1 or 2 if that fails.

    Args:
        config: the flags. If None, they are read from the command line.
        steps: the steps to run. All steps that they need are included.
        description: the description of the experiment, for its record.
        session: an object that is passed to every step that takes its `StepRun`. At the end its `close(error)` is
            called if it has one, unless this was a dry run.
        processes: the processes of this job. By default, there is only this one.
        summary_columns: the columns of the final table that show values of each step's summary.json.
    """
    config = config if config is not None else parse_main_config(ExecutorMainConfig)
    processes = processes or Processes()
    _show_any_text()
    with log_lines(to_stderr=config.json):
        executor = _executor(config, description, session, processes)
        try:
            if config.dry_run or config.explain:
                _show_plan(executor, config, steps, processes)
                return
            with _results_alone_on_stdout() if config.json else nullcontext():
                _run_and_close(executor, config, steps, session)
        except (ConfigError, PlanError) as error:
            _exit_with_usage_error(error)
        except SimpoPipelineError as error:
            if isinstance(error, StorageError) and all(result.seconds is None for result in executor.results):
                _exit_with_usage_error(error)  # the prefix could not be used, so nothing has run
            _show_results(executor, config, processes, summary_columns, error)
            _logger.error("The job failed.", exc_info=error)
            raise SystemExit(FAILED) from error
        _show_results(executor, config, processes, summary_columns, None)


def _show_plan(
    executor: Executor,
    config: ExecutorMainConfig,
    steps: Sequence[ExecutorStep[Any] | InputName],
    processes: Processes,
) -> None:
    _run(executor, config, steps, dry_run=True)
    if processes.is_leader and config.explain:
        explanations = [found for name in config.explain for found in executor.explain(name)]
        print(explanations_text(explanations, as_json=config.json), flush=True)
    elif processes.is_leader:
        print(plan_text(executor.plan, as_json=config.json), flush=True)
    if config.exit_code and any(row.action is not Action.SKIP for row in executor.plan):
        raise SystemExit(PENDING)


def _show_results(
    executor: Executor,
    config: ExecutorMainConfig,
    processes: Processes,
    columns: SummaryColumns,
    error: SimpoPipelineError | None,
) -> None:
    if processes.is_leader:
        print(results_text(executor.results, columns, error, as_json=config.json), flush=True)


def _executor(config: ExecutorMainConfig, description: str | None, session: Any, processes: Processes) -> Executor:
    prefix, info_path = config.effective_prefix, config.executor_info_base_path
    try:
        return Executor(
            prefix,
            info_path,
            description,
            session=session,
            processes=processes,
            lease=config.lease,
            unsafe_locks=config.unsafe_locks,
        )
    except ConfigError as error:
        _exit_with_usage_error(error)


def _run(
    executor: Executor, config: ExecutorMainConfig, steps: Sequence[ExecutorStep[Any] | InputName], *, dry_run: bool
) -> None:
    executor.run(
        steps,
        dry_run=dry_run,
        run_only=config.run_only,
        force_run_failed=config.force_run_failed,
        max_concurrent=config.max_concurrent,
        until=config.until,
        force=config.force,
    )


def _run_and_close(
    executor: Executor, config: ExecutorMainConfig, steps: Sequence[ExecutorStep[Any] | InputName], session: Any
) -> None:
    close = getattr(session, "close", _close_nothing)
    try:
        _run(executor, config, steps, dry_run=False)
    except BaseException as error:
        try:
            close(error)
        except Exception as close_error:  # must not hide the error that ended the job
            _logger.error("The session could not be closed either.", exc_info=close_error)
        raise
    try:
        close(None)
    except Exception as error:  # a tracker's own error; the outputs are committed, but the job did not succeed
        raise StepError(f"All steps succeeded, but the session could not be closed: {error!r}") from error


def _close_nothing(error: BaseException | None) -> None:
    """Do nothing, for sessions without a `close` method."""


def _exit_with_usage_error(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(BAD_USAGE) from None


def _show_any_text() -> None:
    """Escape characters that the terminal cannot show, so that they do not end a job."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _results_alone_on_stdout() -> Generator[None]:
    """Redirect the output of steps and of the programs they start to standard error while the block runs."""
    sys.stdout.flush()
    kept = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, _STDOUT)
        os.close(kept)


@contextmanager
def log_lines(*, to_stderr: bool) -> Generator[None]:
    """Show log lines of level INFO and above, with the time, while the block runs."""
    handler = logging.StreamHandler(sys.stderr if to_stderr else sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    level, propagate = _logger.level, _logger.propagate
    _logger.addHandler(handler)
    # Libraries that a step imports may add a handler to the root logger, which would show each line twice.
    _logger.propagate = False
    _logger.setLevel(logging.INFO)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # hides its tracebacks; its errors become StorageErrors
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)
        _logger.propagate = propagate
