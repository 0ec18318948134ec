"""`executor_main`: what an experiment's script calls. Flags, log lines, tables and exit codes live here and only here.

exit 0   done; the last line is "Job finished with no error."
exit 1   something failed while the DAG ran
exit 2   a flag, the config or the DAG is wrong, or the prefix cannot be used; nothing has run
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
from simpo_pipeline.executor.commands.output import SummaryColumns, explanations_text, plan_text, results_text
from simpo_pipeline.executor.executor import Executor
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
    until: list[str] | None = None
    """Run only these steps, by name, and what comes before them."""
    force: list[str] | None = None
    """Run these steps, by name, also if they are done."""
    explain: list[str] | None = None
    """Print what these steps, by name, are made of and why they are new, and exit; nothing is written."""
    max_concurrent: int | None = None
    """How many steps without live values may run at once."""
    json: bool = False
    """Print the plan, or what came of it, as one JSON object on standard output; log lines go to standard error."""
    exit_code: bool = False
    """With --dry_run: exit with 3 if the plan has work to do, with 0 if all is done."""
    unsafe_locks: bool = False
    """Use a prefix whose file system has no conditional writes, where two jobs may run one step at once."""
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    """How this job claims the steps it runs."""

    def __post_init__(self) -> None:
        if self.exit_code and not self.dry_run:
            raise ConfigError("--exit_code tells whether a plan has work to do. Give it together with --dry_run.")

    @property
    def effective_prefix(self) -> str:
        """`prefix`, else MARIN_PREFIX, else ./runs."""
        return self.prefix or os.environ.get("MARIN_PREFIX") or "runs"


def parse_main_config(config_class: type[ConfigT]) -> ConfigT:
    """The config in the command line; a bad one is told in one sentence, and the script exits with 2."""
    with usage_errors_told():
        return parse_arguments(config_class, sys.argv[1:])


@contextmanager
def usage_errors_told() -> Generator[None]:
    """Around what a script makes of its command line: a ConfigError is one sentence, and the script exits with 2."""
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
    """Plan and run the steps as the flags say; leaves the script with exit code 1 or 2 when that does not go well.

    `config` is read from the command line when it is None. `session` is handed to every step that asks for its run; at
    the end its `close(error)` is called if it has one, unless this was a dry run.
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
    raise SystemExit(BAD_USAGE) from None


def _show_any_text() -> None:
    """A character that the terminal cannot show must not end a job."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _results_alone_on_stdout() -> Generator[None]:
    """What steps and the programs they start print goes to standard error while the block runs."""
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
    """Show INFO and above with the time, while the block runs."""
    handler = logging.StreamHandler(sys.stderr if to_stderr else sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    level, propagate = _logger.level, _logger.propagate
    _logger.addHandler(handler)
    # Libraries that a step imports may give the root logger a handler, and each line would be shown twice.
    _logger.propagate = False
    _logger.setLevel(logging.INFO)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its tracebacks; what it raises is told as a StorageError
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)
        _logger.propagate = propagate
