"""A DAG of steps that pass live values to each other. Names and semantics follow Marin where Marin has them."""

from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.main import ExecutorMainConfig, executor_main
from simpo_pipeline.executor.step import (
    THIS_OUTPUT_PATH,
    ExecutorStep,
    InputName,
    OutputName,
    VersionedValue,
    borrow,
    ensure_versioned,
    get_executor_step,
    output_path_of,
    take,
    this_output_path,
    unwrap_versioned_value,
    versioned,
)

__all__ = [
    "THIS_OUTPUT_PATH",
    "Executor",
    "ExecutorMainConfig",
    "ExecutorStep",
    "InputName",
    "OutputName",
    "VersionedValue",
    "borrow",
    "ensure_versioned",
    "executor_main",
    "get_executor_step",
    "output_path_of",
    "take",
    "this_output_path",
    "unwrap_versioned_value",
    "versioned",
]
