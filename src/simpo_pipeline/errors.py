"""The exceptions of simpo_pipeline.

    SimpoPipelineError
    ├── ConfigError (ValueError)            a setting, a flag or a YAML key is wrong
    ├── DataError (ValueError)              a row, a file or a tokenizer does not have the expected content
    ├── ModelError (ValueError)             weights or a model config that this package does not support
    ├── CapacityError (ValueError)          a request that exceeds the engine's pages or lengths
    ├── StorageError (OSError)              a path could not be read or written
    │   ├── PathNotFoundError (FileNotFoundError)   nothing is stored at the path
    │   └── FileLockedError                 another process on this machine holds the lock of the file
    ├── PlanError (ValueError)              the DAG itself is wrong; nothing has run
    │   ├── IdentityError                   a config value has no canonical form
    │   └── LiveEdgeError                   borrow or take edges that cannot be satisfied
    ├── TrainingError (RuntimeError)        an update failed, or a trainer without a state was used
    ├── StepError (RuntimeError)            something failed while the DAG ran
    │   ├── StepFailedError                 a step function raised
    │   ├── ReplayMismatchError             a replayed step produced a different live value than its first run
    │   ├── LeaseLostError                  another job now holds the output path
    │   └── StepCancelledError              the job was interrupted while the step ran
    ├── ProgramError (RuntimeError)         device programs differ between hosts, or one was launched outside the ledger
    └── CoordinationError (RuntimeError)    the processes of one job lost contact or diverged
        └── PeerFailedError                 another process failed, so this one stopped too

Every message says what was found, what is allowed, and what to do. Classes also inherit the standard type that a
caller would expect, so `except ValueError` works without importing this module.
"""


class SimpoPipelineError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigError(SimpoPipelineError, ValueError):
    """A setting, a command-line flag or a YAML key is wrong."""


class DataError(SimpoPipelineError, ValueError):
    """A row, a file or a tokenizer does not have the expected content."""


class ModelError(SimpoPipelineError, ValueError):
    """Weights or a model config that this package does not support."""


class CapacityError(SimpoPipelineError, ValueError):
    """A request that exceeds the engine's pages or lengths."""


class StorageError(SimpoPipelineError, OSError):
    """A path could not be read or written."""


class PathNotFoundError(StorageError, FileNotFoundError):
    """Nothing is stored at the path."""


class FileLockedError(StorageError):
    """Another process on this machine holds the lock of the file."""


class PlanError(SimpoPipelineError, ValueError):
    """The DAG itself is wrong; nothing has run."""


class IdentityError(PlanError):
    """A config value has no canonical form, so the step has no stable version."""


class LiveEdgeError(PlanError):
    """Borrow or take edges that cannot be satisfied."""


class TrainingError(SimpoPipelineError, RuntimeError):
    """An update failed, or a trainer without a state was used."""


class StepError(SimpoPipelineError, RuntimeError):
    """Something failed while the DAG ran."""


class StepFailedError(StepError):
    """A step function raised."""


class ReplayMismatchError(StepError):
    """A replayed step produced a different live value than its first run."""


class LeaseLostError(StepError):
    """Another job now holds the output path."""


class StepCancelledError(StepError):
    """The job was interrupted while the step ran."""


class ProgramError(SimpoPipelineError, RuntimeError):
    """Device programs differ between hosts, or one was launched outside the ledger."""


class CoordinationError(SimpoPipelineError, RuntimeError):
    """The processes of one job lost contact or diverged."""


class PeerFailedError(CoordinationError):
    """Another process of the job failed, so this one stopped too."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
