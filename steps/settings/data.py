"""Settings of the preference data: one component under `data.components`, from files or from the hub."""

import dataclasses
from typing import cast

from simpo_pipeline.data.config import PreferenceSource, TooLong
from simpo_pipeline.errors import ConfigError

SOURCE_TYPES = ("url", "hf")
SLICE_STRATEGIES = ("raise", "truncate", "drop")


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """Where a component lies.

    Attributes:
        type: `url` (files at any storage path) or `hf` (a dataset of the Hugging Face hub).
        train_urls: For `url`: one path or glob of `.jsonl` or `.parquet` files, relative to the working directory.
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
            raise ConfigError(f"source.type is {self.type!r}; allowed is one of {', '.join(SOURCE_TYPES)}")
        if self.type == "url" and (len(self.train_urls) != 1 or self.id or self.splits or self.revision):
            raise ConfigError("a source of type url needs train_urls with exactly one path or glob, and nothing else")
        if self.type == "hf" and (self.id is None or len(self.splits) != 1 or self.train_urls):
            raise ConfigError("a source of type hf needs id, splits with exactly one split, and no train_urls")

    def preference_source(self) -> PreferenceSource:
        """The same place as `prepare_pairs` reads it."""
        if self.type == "url":
            return PreferenceSource(self.train_urls[0])
        return PreferenceSource(cast(str, self.id), split=self.splits[0], revision=self.revision)


@dataclasses.dataclass(frozen=True)
class FormatSettings:
    """How a component's rows are read: pairs of chats, and what happens to those that are too long."""

    type: str = "preference_chat"
    slice_strategy: str = "raise"
    pack: bool = False


@dataclasses.dataclass(frozen=True)
class ComponentSettings:
    """One dataset."""

    source: SourceSettings
    format: FormatSettings = dataclasses.field(default_factory=FormatSettings)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The training data.

    Attributes:
        components: Exactly one dataset, under a name of its own.
        train_weights: Weights by component; with one component there is nothing to weigh, so only a positive one fits.
        tokenizer: Folder or hub id whose tokenizer replaces the model's own, which base models need: theirs has no
            chat template.
    """

    components: dict[str, ComponentSettings]
    train_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if len(self.components) != 1:
            raise ConfigError(
                f"data.components has {len(self.components)} datasets ({', '.join(self.components)}); "
                "exactly one is trained on: leave out those of weight 0, and join others in one folder"
            )
        for name, weight in self.train_weights.items():
            if name not in self.components or weight <= 0:
                raise ConfigError(
                    f"data.train_weights gives {name} {weight}; only the component itself can have a weight, "
                    "above 0: leave the others out"
                )
        self._check_format()

    def _check_format(self) -> None:
        name, form = self.name, self.component.format
        if form.type != "preference_chat":
            raise ConfigError(
                f"SimPO training requires preference_chat datasets. Component '{name}' has format {form.type}"
            )
        if form.pack:
            raise ConfigError(f"Packed preference_chat datasets are not supported yet. Packed datasets: {name}")
        if form.slice_strategy not in SLICE_STRATEGIES:
            raise ConfigError(
                f"preference_chat slice_strategy must be one of {', '.join(SLICE_STRATEGIES)}. "
                f"Invalid datasets: {name} ({form.slice_strategy})"
            )

    @property
    def name(self) -> str:
        """The component's name."""
        return next(iter(self.components))

    @property
    def component(self) -> ComponentSettings:
        """The one dataset."""
        return self.components[self.name]

    @property
    def too_long(self) -> TooLong:
        """What `prepare_pairs` does with a pair that is too long."""
        return cast(TooLong, self.component.format.slice_strategy)
