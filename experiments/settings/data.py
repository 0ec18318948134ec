"""Settings of the preference data: components under `data.components`, each read from files or from the hub."""

import dataclasses
import math
import re
from typing import Any, cast

from simpo_pipeline.data.config import ChatConfig, PreferenceSource, TooLong
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import versioned

SOURCE_TYPES = ("url", "hf")
SLICE_STRATEGIES = ("raise", "truncate", "drop")


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """Source of a component.

    Attributes:
        type: `url` (files at any storage path) or `hf` (a dataset of the Hugging Face hub).
        train_urls: For `url`: one path or pattern of files (docs/data.md), relative to the working directory.
        id: For `hf`: the dataset's name.
        splits: For `hf`: the one split to train on.
        revision: For `hf`: commit, tag or branch.
    """

    type: str
    train_urls: tuple[str, ...] = ()
    id: str | None = None
    splits: tuple[str, ...] = ()
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.type not in SOURCE_TYPES:
            raise ConfigError(f"source.type is {self.type!r}; expected one of {', '.join(SOURCE_TYPES)}")
        if self.type == "url" and (len(self.train_urls) != 1 or self.id or self.splits or self.revision):
            raise ConfigError("a source of type url needs train_urls with exactly one path or glob, and nothing else")
        if self.type == "hf" and (self.id is None or len(self.splits) != 1 or self.train_urls):
            raise ConfigError("a source of type hf needs id, splits with exactly one split, and no train_urls")

    def preference_source(self) -> PreferenceSource:
        """Return the source in the form that `prepare_pairs` takes."""
        if self.type == "url":
            return PreferenceSource(self.train_urls[0])
        return PreferenceSource(cast(str, self.id), split=self.splits[0], revision=self.revision)


@dataclasses.dataclass(frozen=True)
class FormatSettings:
    """Format of a component's rows, which are pairs of chats, and the treatment of pairs that are too long."""

    type: str = "preference_chat"
    slice_strategy: str = "raise"
    pack: bool = False


@dataclasses.dataclass(frozen=True)
class ComponentSettings:
    """One dataset."""

    source: SourceSettings
    format: FormatSettings = dataclasses.field(default_factory=FormatSettings)

    @property
    def too_long(self) -> TooLong:
        """Treatment of a pair that is too long, for `prepare_pairs`."""
        return cast(TooLong, self.format.slice_strategy)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The training data.

    Attributes:
        components: The datasets by name. If there are several, a dataset's name is part of the name of its step.
        train_weights: Relative rates at which pairs are read from the components, above 0; the default is 1.
        tokenizer: Folder or hub id whose tokenizer replaces the model's own. Base models need one, because their own
            tokenizer has no chat template.
        chat: How conversations become tokens, in training and in generation; see `ChatConfig`.
    """

    components: dict[str, ComponentSettings]
    train_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    chat: ChatConfig = dataclasses.field(default_factory=ChatConfig)

    def __post_init__(self) -> None:
        if not self.components:
            raise ConfigError("data.components has no datasets; give at least one to train on")
        for name, weight in self.train_weights.items():
            if name not in self.components or not (math.isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"data.train_weights sets {name} to {weight}; expected a component "
                    f"({', '.join(self.components)}) and a weight above 0. Leave out components that are not trained on"
                )
        for name, component in self.components.items():
            self._check_name(name)
            self._check_format(name, component.format)

    def _check_name(self, name: str) -> None:
        if len(self.components) > 1 and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ConfigError(
                f"data.components has a dataset named {name!r}; with several datasets, each name becomes part of a "
                "step's name: use letters, digits, '.', '_' and '-'"
            )

    def _check_format(self, name: str, form: FormatSettings) -> None:
        if form.type != "preference_chat":
            raise ConfigError(
                f"SimPO training requires preference_chat datasets. Component '{name}' has format {form.type}"
            )
        if form.pack:
            raise ConfigError(
                f"Packed preference_chat datasets are not supported yet. Packed datasets: {name}; set trainer.packing "
                "instead, which packs pairs of all datasets"
            )
        if form.slice_strategy not in SLICE_STRATEGIES:
            raise ConfigError(
                f"preference_chat slice_strategy must be one of {', '.join(SLICE_STRATEGIES)}. "
                f"Invalid datasets: {name} ({form.slice_strategy})"
            )

    def weight(self, name: str) -> float:
        """Return the relative rate at which pairs are read from a component."""
        return self.train_weights.get(name, 1.0)


def versioned_chat(chat: ChatConfig) -> Any:
    """Return the chat config for a step's config, versioned unless it is the default, which changes no token."""
    return chat if chat == ChatConfig() else versioned(chat)
