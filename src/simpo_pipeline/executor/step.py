"""Building blocks of experiments: steps, and the markers that their configs may contain. Names follow Marin.

A step is inert: it knows its name, function and config, but not its version, its output path or whether it has run.
These markers may appear in a config, at any depth of dataclasses, lists, tuples and dicts:

    step, step / "sub"        becomes the output path of another step, or a path below it
    this_output_path("sub")   becomes the step's own output path, or a path below it
    versioned(x)              becomes x, and makes x part of the step's identity
    content_of(path)          becomes path, and makes the content of the files there part of the step's identity
    borrow(step), take(step)  becomes the live value that the other step published, in this process

Functions that make markers are annotated to return `Any`, so that a config field can be annotated with the type that
the step function reads (`str`, `float`), not with the marker that an experiment may write there.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar, cast

from simpo_pipeline.errors import IdentityError, LiveEdgeError, PlanError

ConfigT = TypeVar("ConfigT")

BODY_MODULE = "body_module"
"""Attribute of a step function with the name of the module that has its code. See `imported_step`."""

StepFunction = Callable[..., Any]
"""fn(config), with or without the parameters `output: OutputFolder` and `run: StepRun`; it returns None or a Live."""


def imported_step(path: str, *, module: str, takes: tuple[str, ...]) -> StepFunction:
    """Return a step function that is imported when it is called, so that planning does not load what it needs.

    Args:
        path: Import path of the function, such as `steps.bodies.train.train`.
        module: Module that offers the step function, `__name__` there. Records name the function by it.
        takes: Parameters of the function after the config: "output", "run" or both.
    """

    body, _, function = path.rpartition(".")

    def call(*arguments: Any, **handles: Any) -> Any:
        return getattr(importlib.import_module(body), function)(*arguments, **handles)

    call.__module__, call.__name__, call.__qualname__ = module, function, function
    setattr(call, BODY_MODULE, body)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    setattr(call, "__signature__", inspect.Signature([inspect.Parameter(name, kind) for name in ("config", *takes)]))  # noqa: B010
    return call


@dataclass(frozen=True, eq=False, repr=False)
class ExecutorStep(Generic[ConfigT]):
    """One step of a DAG.

    Two step objects are never equal, even if all their fields are; only the executor compares identities.

    Raises:
        PlanError: The name cannot be part of a path.
    """

    name: str
    """Beginning of the output path, where slashes create folders. It stands for `fn` in the identity of the step."""
    fn: StepFunction | None
    config: ConfigT
    description: str | None = None
    override_output_path: str | None = None
    """Used instead of `{prefix}/{name}-{hash}`. Relative paths are below the prefix."""
    pip_dependency_groups: list[str] | None = None
    """From Marin, which runs steps as separate jobs. Recorded, but unused here because all steps run in this job."""
    resources: Any = None
    """From Marin, like `pip_dependency_groups`."""

    def __post_init__(self) -> None:
        if any(part in ("", ".", "..") or part.startswith(".") for part in self.name.split("/")):
            raise PlanError(
                f"A step is named {self.name!r}. A name is one or more parts joined by '/'; no part may be empty "
                "or begin with a dot. Rename the step."
            )
        if inspect.iscoroutinefunction(self.fn) or inspect.isgeneratorfunction(self.fn):
            raise PlanError(
                f"The function of step {self.name!r} is a coroutine or a generator, so calling it would not run its "
                "body. Give a plain function."
            )

    def __repr__(self) -> str:
        return f"ExecutorStep(name={self.name!r})"

    def cd(self, name: str) -> Any:
        """Return the path `name` below this step's output path."""
        return InputName(self, name)

    def __truediv__(self, name: str) -> Any:
        return self.cd(name)

    def as_input_name(self) -> "InputName":
        """Return this step's output path."""
        return InputName(self, None)

    def nonblocking(self) -> Any:
        """Return this step's output path for the identity alone. It neither runs the step nor waits for it."""
        return self.as_input_name().nonblocking()

    def with_output_path(self, output_path: str) -> "ExecutorStep[ConfigT]":
        """Return the same step with a different output path."""
        return dataclasses.replace(self, override_output_path=output_path)


@dataclass(frozen=True)
class InputName:
    """A path below another step's output path, or below the prefix if `step` is None."""

    step: "ExecutorStep[Any] | None"
    name: str | None
    block_on_step: bool = True

    def cd(self, name: str) -> Any:
        """Return the path `name` below this one."""
        return dataclasses.replace(self, name=f"{self.name.rstrip('/')}/{name}" if self.name else name)

    def __truediv__(self, name: str) -> Any:
        return self.cd(name)

    def nonblocking(self) -> Any:
        """Return the same path for the identity alone. It neither runs the step nor waits for it."""
        return dataclasses.replace(self, block_on_step=False)

    @staticmethod
    def hardcoded(path: str) -> Any:
        """Return a path that no step produces: absolute, a URL, or relative to the prefix."""
        return InputName(None, path)


@dataclass(frozen=True)
class OutputName:
    """The output path of the step whose config contains this marker, or a path below it."""

    name: str | None


THIS_OUTPUT_PATH: Any = OutputName(None)


def this_output_path(name: str | None = None) -> Any:
    """Return the output path of the step whose config contains this marker, or a path below it."""
    return OutputName(name)


def output_path_of(step: "ExecutorStep[Any]", name: str | None = None) -> Any:
    """Return the output path of another step, or a path below it."""
    return InputName(step, name)


@dataclass(frozen=True)
class VersionedValue:
    """A value that is part of the step's identity."""

    value: Any


def versioned(value: Any) -> Any:
    """Make a value part of the identity of the step whose config contains it.

    Raises:
        IdentityError: The value is a marker or is already versioned, so it needs no `versioned`.
    """
    if isinstance(value, VersionedValue | InputName | ExecutorStep | OutputName | LiveInput | ContentOf):
        kind = type(cast(object, value)).__name__
        raise IdentityError(f"versioned() got a {kind}. Pass a plain value; markers need no versioned().")
    return VersionedValue(cast(object, value))


@dataclass(frozen=True)
class ContentOf:
    """Files that no step wrote. Their content is part of the step's identity."""

    path: str
    """The value in the config that the step function gets. It also stands for the files if none exist."""
    files: Callable[[], Sequence[str]]
    """Returns the paths of the files, or of one folder."""


def content_of(path: str) -> Any:
    """Return a marker for a file, or all files below a folder. It becomes the path, and versions the content."""
    return ContentOf(path, lambda: [path])


OUTSIDE_FILES = "simpo_pipeline.outside_files"
"""Key of the metadata of config fields that are declared with `outside_path`."""


def outside_path(names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the metadata of a dataclass field that contains the path of a file or folder that no step wrote.

    If files exist at the path, their content and the ending of a single file's name are part of the identity of a step
    with such a config, whether or not the path is versioned. The path itself is not. Otherwise, as for the id of a
    model on a hub, the value is treated like any other.

    Args:
        names: Patterns of names. If given, only the matching files directly in the folder count.
    """
    return {OUTSIDE_FILES: tuple(names)}


ADDED_LATER = "simpo_pipeline.added_later"
"""Key of the metadata of config fields that are declared with `added_later`."""


def added_later(*, default: Any) -> Any:
    """Return a dataclass field that older outputs did not have: its default is left out of a step's identity."""
    return dataclasses.field(default=default, metadata={ADDED_LATER: True})


def ensure_versioned(value: Any) -> Any:
    """Return the value as a versioned value, without versioning it twice."""
    return cast(Any, value) if isinstance(value, VersionedValue) else versioned(value)


def unwrap_versioned_value(value: Any) -> Any:
    """Remove `versioned` from the value, at any depth of dataclasses, dicts, lists and tuples."""
    if isinstance(value, VersionedValue):
        return unwrap_versioned_value(cast(Any, value).value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, ExecutorStep | InputName | OutputName | LiveInput | ContentOf):
            return cast(Any, value)
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: unwrap_versioned_value(inner) for name, inner in fields.items()})
    if isinstance(value, dict):
        return {key: unwrap_versioned_value(inner) for key, inner in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        members: list[Any] = [unwrap_versioned_value(inner) for inner in cast(list[Any], value)]
        kind: Any = type(cast(object, value))
        return kind(*members) if hasattr(kind, "_fields") else kind(members)
    return value


def get_executor_step(run: "ExecutorStep[Any] | InputName") -> "ExecutorStep[Any]":
    """Return the step that `run` is, or that produces the path `run`.

    Raises:
        PlanError: No step produces the path, or `run` is neither a step nor a path.
    """
    step = run.step if isinstance(run, InputName) else run
    if not isinstance(cast(object, step), ExecutorStep):
        raise PlanError(f"No step produces {run!r}. Pass an ExecutorStep or a path of one.")
    return cast(ExecutorStep[Any], step)


class LiveUse(StrEnum):
    """How a consumer may use a live value."""

    BORROW = "borrow"
    """Read the value, without changing or keeping it."""
    TAKE = "take"
    """Become the owner of the value: change it, donate its buffers, publish it again."""


@dataclass(frozen=True)
class LiveInput:
    """A live value that another step publishes."""

    step: "ExecutorStep[Any]"
    use: LiveUse


def borrow(step: object) -> Any:
    """Return a marker for the live value of another step, which is read-only and released when this step ends.

    Raises:
        LiveEdgeError: `step` is not a step.
    """
    return LiveInput(_producer(step, LiveUse.BORROW), LiveUse.BORROW)


def take(step: object) -> Any:
    """Return a marker for the live value of another step, which this step then owns. All borrowers finish first.

    Raises:
        LiveEdgeError: `step` is not a step.
    """
    return LiveInput(_producer(step, LiveUse.TAKE), LiveUse.TAKE)


def _producer(step: object, use: LiveUse) -> "ExecutorStep[Any]":
    if not isinstance(step, ExecutorStep):
        raise LiveEdgeError(f"{use}() got {step!r}. Pass the ExecutorStep that publishes the value, not a path.")
    return cast(ExecutorStep[Any], step)


_WHY = {
    LiveUse.TAKE: "The step changes the value, and other steps that borrow it would see the change",
    LiveUse.BORROW: "The step only reads the value, and a value that is taken is never freed for it",
}


def require_live_use(field: str, value: Any, use: LiveUse) -> None:
    """Check that a config uses a live value in the only way that its step function supports.

    Call it in `__post_init__`. It accepts everything that is no marker, which includes the value that the step function
    gets.

    Args:
        field: Name of the config and its field, for the message.
        value: Content of the field.
        use: The supported use.

    Raises:
        LiveEdgeError: The field contains another marker.
    """
    if isinstance(value, LiveInput) and value.use is not use:
        found, producer = f"{value.use}({value.step.name!r})", value.step.name
    elif isinstance(value, ExecutorStep | InputName | OutputName | VersionedValue | ContentOf):
        found, producer = f"{cast(object, value)!r}", "step"
    else:
        return
    raise LiveEdgeError(f"{field} is {found}, but only {use}({producer}) is allowed there. {_WHY[use]}.")
