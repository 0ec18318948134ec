"""The exceptions of simpo_pipeline.

    SimpoPipelineError
    ├── ConfigError (ValueError)            a setting, a flag or a YAML key is wrong
    ├── DataError (ValueError)              a row, a file or a tokenizer does not hold what was promised
    ├── ModelError (ValueError)             weights or a model config that we do not support
    ├── CapacityError (ValueError)          a request that the engine's pages or lengths cannot hold
    ├── StorageError (OSError)              a path could not be read or written
    │   ├── PathNotFoundError (FileNotFoundError)   nothing is stored at the path
    │   └── FileLockedError                 another process of this machine keeps the file locked
    ├── PlanError (ValueError)              the DAG itself is wrong; nothing has run
    │   ├── IdentityError                   a config value has no canonical form
    │   └── LiveEdgeError                   borrow/take edges that cannot be served
    ├── TrainingError (RuntimeError)        an update failed, or a trainer is used that has lost its state
    ├── StepError (RuntimeError)            something failed while the DAG ran
    │   ├── StepFailedError                 a step function raised
    │   ├── ReplayMismatchError             a replayed step gave another live value than its first run
    │   ├── LeaseLostError                  another job holds the output path now
    │   └── StepCancelledError              the job was interrupted while the step ran
    ├── ProgramError (RuntimeError)         device programs differ between hosts, or one was launched outside the ledger
    └── CoordinationError (RuntimeError)    the processes of one job lost each other, or do different things
        └── PeerFailedError                 another process failed, and this one stopped to follow it

Every message says what was got, what is allowed, and what to do. Classes also inherit the standard type a caller
would expect, so `except ValueError` works without importing this module.
"""


class SimpoPipelineError(Exception):
    """Root of every error raised on purpose by this package."""


class ConfigError(SimpoPipelineError, ValueError):
    """A setting, a command-line flag or a YAML key is wrong."""


class DataError(SimpoPipelineError, ValueError):
    """A row, a file or a tokenizer does not hold what was promised."""


class ModelError(SimpoPipelineError, ValueError):
    """Weights or a model config that this package does not support."""


class CapacityError(SimpoPipelineError, ValueError):
    """A request that the engine's pages or lengths cannot hold."""


class StorageError(SimpoPipelineError, OSError):
    """A path could not be read or written."""


class PathNotFoundError(StorageError, FileNotFoundError):
    """Nothing is stored at the path."""


class FileLockedError(StorageError):
    """Another process of this machine keeps the file locked."""


class PlanError(SimpoPipelineError, ValueError):
    """The DAG itself is wrong; nothing has run."""


class IdentityError(PlanError):
    """A config value has no canonical form, so the step has no stable version."""


class LiveEdgeError(PlanError):
    """Borrow and take edges that cannot be served."""


class TrainingError(SimpoPipelineError, RuntimeError):
    """An update failed, or a trainer is used that has lost its state."""


class StepError(SimpoPipelineError, RuntimeError):
    """Something failed while the DAG ran."""


class StepFailedError(StepError):
    """A step function raised."""


class ReplayMismatchError(StepError):
    """A replayed step gave another live value than its first run."""


class LeaseLostError(StepError):
    """Another job holds the output path now."""


class StepCancelledError(StepError):
    """The job was interrupted while the step ran."""


class ProgramError(SimpoPipelineError, RuntimeError):
    """Device programs differ between hosts, or one was launched outside the ledger."""


class CoordinationError(SimpoPipelineError, RuntimeError):
    """The processes of one job lost each other, or do different things."""


class PeerFailedError(CoordinationError):
    """Another process of the job failed, and this one stopped to follow it."""


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
