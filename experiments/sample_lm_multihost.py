"""Sample from a model in Hugging Face layout, configured by a settings file, on one host or many.

    python experiments/sample_lm_multihost.py --config_path experiments/configs/sample_smollm2_1prompt.yaml
        [--prefix PATH] [--dry_run] [--tracker wandb|jsonl|none] [--key.path value ...]

fetch_model -> infer -> show_samples. Settings on the command line override the file.
"""

import dataclasses
import itertools
import logging

from experiments.settings.command_line import parse_command_line_or_exit
from experiments.settings.fetch_checked_model import fetch_step
from experiments.settings.sample_lm_multihost import SampleLmMultihostConfig
from simpo_pipeline.executor.step import ExecutorStep, output_path_of, versioned
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.job.main import main
from simpo_pipeline.storage.files import list_files
from simpo_pipeline.storage.jsonl import read_jsonl
from simpo_pipeline.storage.paths import join
from steps.infer import infer

logger = logging.getLogger("simpo_pipeline.sample_lm_multihost")
TITLE = "sample_lm_multihost"
MERGED = "all_hosts_merged"  # prefix of the name of infer's file of all rows
MAX_SHOWN = 16  # enough for a terminal; the merged file has all rows


@dataclasses.dataclass(frozen=True)
class ShowSamplesConfig:
    """Path of the output of `infer`."""

    samples_path: str


def show_samples(config: ShowSamplesConfig) -> None:
    """Log the first samples with their prompts."""
    merged = [file.relative_path for file in list_files(config.samples_path) if file.relative_path.startswith(MERGED)]
    for path in merged:
        for row in itertools.islice(read_jsonl(join(config.samples_path, path)), MAX_SHOWN):
            logger.info(
                "prompt %d, sample %d (%d tokens, %s): %s\n%s",
                *(row["global_prompt_index"], row["sample_index"], row["generated_token_count"], row["finish_reason"]),
                *(row["prompt"], row["generated_text"]),
            )


def sampler_steps(settings: SampleLmMultihostConfig) -> list[ExecutorStep]:
    """Return the DAG for a settings file."""
    model = fetch_step(settings.hf_checkpoint, settings.model, settings.tokenizer)
    generation = settings.build_generation(output_path_of(model))
    marked = {name: versioned(getattr(generation, name)) for name in ("prompts", "sampling", "chat", "compute_dtype")}
    count = generation.prompts.count
    samples = ExecutorStep(
        f"infer{'' if count is None else f'-{count}'}", infer, dataclasses.replace(generation, **marked)
    )
    return [model, samples, ExecutorStep("show_samples", show_samples, ShowSamplesConfig(output_path_of(samples)))]


if __name__ == "__main__":
    settings, flags = parse_command_line_or_exit(SampleLmMultihostConfig, JobFlags)
    main(
        flags,
        steps=sampler_steps(settings),
        description=f"samples of {settings.hf_checkpoint}",
        tracker=settings.trainer.tracker.choice(TITLE),
    )
