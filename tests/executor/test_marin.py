"""An experiment written for Marin's executor of mid-2026, in which only the import lines are changed."""

from dataclasses import dataclass, field
from typing import Any

import pytest

import simpo_pipeline.executor as package
from simpo_pipeline.errors import PlanError
from simpo_pipeline.executor import (
    THIS_OUTPUT_PATH,
    Executor,
    ExecutorMainConfig,
    ExecutorStep,
    InputName,
    VersionedValue,
    ensure_versioned,
    executor_main,
    get_executor_step,
    output_path_of,
    this_output_path,
    unwrap_versioned_value,
    versioned,
)
from simpo_pipeline.storage.files import read_json, read_text, write_text
from simpo_pipeline.storage.paths import join


@dataclass(frozen=True)
class DownloadConfig:
    dataset_id: str
    revision: str
    gcs_output_path: str = THIS_OUTPUT_PATH
    wait_for_completion: bool = True


def download(config: DownloadConfig):
    write_text(join(config.gcs_output_path, config.revision, "data.jsonl"), f"{config.dataset_id}@{config.revision}")


@dataclass(frozen=True)
class TokenizeConfig:
    train_paths: list[str]
    validation_paths: list[str]
    cache_path: str
    tokenizer: str
    sizes: dict[str, int] = field(default_factory=dict)


def tokenize(config: TokenizeConfig):
    write_text(join(config.cache_path, "cache.txt"), "\n".join(read_text(path) for path in config.train_paths))


@dataclass(frozen=True)
class TrainConfig:
    data: TokenizeConfig
    cache: str
    warmstart: str
    raw: str
    learning_rate: float
    output_path: str


def train(config: TrainConfig):
    text = f"{read_text(join(config.cache, 'cache.txt'))} lr={config.learning_rate} {config.data.tokenizer}"
    write_text(join(config.output_path, "checkpoint.txt"), text)


def default_tokenize(name: str, dataset: Any, tokenizer: Any) -> ExecutorStep:
    config = TokenizeConfig(
        train_paths=[dataset],
        validation_paths=versioned([]),
        cache_path=this_output_path(),
        tokenizer=ensure_versioned(tokenizer),
    )
    return ExecutorStep(
        name=f"tokenized/{name}",
        fn=tokenize,
        config=config,
        description=f"Tokenize {name}.",
        pip_dependency_groups=["tokenize"],
        resources={"cpu": 4},
    )


def experiment() -> list[ExecutorStep]:
    raw = ExecutorStep(
        name="raw/latxa_corpus",
        fn=download,
        config=DownloadConfig(dataset_id="HiTZ/latxa-corpus-v1.1", revision=versioned("02dc515")),
        override_output_path="raw/latxa_corpus-v1.1",
    )
    tokenized = default_tokenize("latxa_corpus", raw.cd("02dc515") / "data.jsonl", "llama3")
    long_run = ExecutorStep(name="checkpoints/long-run", fn=None, config={"steps": versioned(10**6)})
    sweep = [
        ExecutorStep(
            name=f"checkpoints/latxa-{learning_rate}",
            fn=train,
            config=TrainConfig(
                data=tokenized.config,
                cache=output_path_of(tokenized),
                warmstart=output_path_of(long_run, "step-1000").nonblocking(),
                raw=InputName.hardcoded("documents/notes"),
                learning_rate=versioned(learning_rate),
                output_path=this_output_path(),
            ),
        )
        for learning_rate in (1e-3, 3e-3)
    ]
    return [raw, *sweep]


def test_an_experiment_for_marin_runs_unchanged(prefix, capsys):
    steps = experiment()
    executor_main(ExecutorMainConfig(prefix=prefix), steps=steps, description="Latxa.")
    assert capsys.readouterr().out.splitlines()[-1] == "Job finished with no error."
    executor = Executor(prefix=prefix, executor_info_base_path=join(prefix, "experiments"))
    executor.run(steps=steps, dry_run=True)
    raw, low, high = steps
    assert executor.output_paths[raw] == join(prefix, "raw/latxa_corpus-v1.1")
    assert executor.configs[low].raw == join(prefix, "documents/notes")
    assert executor.configs[low].warmstart.endswith("/step-1000")
    # As in Marin, `this_output_path` is the path of the step whose config contains it.
    assert executor.configs[low].data.cache_path == executor.output_paths[low]
    assert read_text(join(executor.output_paths[high], "checkpoint.txt")) == (
        "HiTZ/latxa-corpus-v1.1@02dc515 lr=0.003 llama3"
    )
    assert [step.name for step in executor.dependencies[low]] == ["raw/latxa_corpus", "tokenized/latxa_corpus"]
    assert {row.action for row in executor.plan} == {"SKIP"}
    tokenized = executor.dependencies[low][1]
    info = read_json(join(executor.output_paths[tokenized], ".executor_info"))
    assert (info["pip_dependency_groups"], info["resources"]) == (["tokenize"], {"cpu": 4})
    assert executor.versions[low]["pseudo_dependencies"]


def test_job_settings_of_a_step_are_not_part_of_its_identity(prefix):
    config = {"x": versioned(1)}
    plain = ExecutorStep("step", None, config)
    placed = ExecutorStep("step", None, config, "why", None, ["gpu"], {"tpu": "v5p-8"})
    executor = Executor(prefix)
    executor.run([plain, placed], dry_run=True)
    assert executor.version_strs[plain] == executor.version_strs[placed]
    assert len(executor.steps) == 1


def test_the_helpers_behave_like_those_of_marin():
    step = ExecutorStep("step", None, None)
    assert get_executor_step(step) is step
    assert get_executor_step(step / "x") is step
    with pytest.raises(PlanError, match="No step produces"):
        get_executor_step(InputName.hardcoded("x"))
    nested = TrainConfig(
        data=versioned({"sizes": [versioned(1), (versioned(2),)]}),
        cache=step / "cache",
        warmstart=versioned("w"),
        raw="r",
        learning_rate=1.0,
        output_path=THIS_OUTPUT_PATH,
    )
    plain = unwrap_versioned_value(nested)
    assert plain.data == {"sizes": [1, (2,)]}
    assert (plain.warmstart, plain.cache, plain.output_path) == ("w", step / "cache", THIS_OUTPUT_PATH)
    assert ensure_versioned(versioned(1)) == VersionedValue(1)


def test_every_exported_name_exists():
    assert all(hasattr(package, name) for name in package.__all__)
