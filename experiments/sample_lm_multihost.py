"""Samples from a model in Hugging Face layout, as a settings file says, on one host or many.

    python experiments/sample_lm_multihost.py --config_path experiments/configs/sample_smollm2_1prompt.yaml
        [--prefix PATH] [--dry_run] [--tracker wandb|jsonl|none] [--key.path value ...]

fetch_model -> infer -> show_samples. A setting on the command line wins over the file.
"""

import dataclasses
import itertools
import logging

from experiments.settings.command_line import parse_command_line_or_exit
from experiments.settings.fetch_checked_model import fetch_step
from experiments.settings.retired import SAMPLE_LM_MULTIHOST
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
MERGED = "all_hosts_merged"  # how infer's file of all rows begins
MAX_SHOWN = 16  # a terminal's worth; the rest is in the merged file


@dataclasses.dataclass(frozen=True)
class ShowSamplesConfig:
    """The output of `infer`."""

    samples_path: str


def show_samples(config: ShowSamplesConfig) -> None:
    """Logs the first samples, prompt and answer."""
    merged = [file.relative_path for file in list_files(config.samples_path) if file.relative_path.startswith(MERGED)]
    for path in merged:
        for row in itertools.islice(read_jsonl(join(config.samples_path, path)), MAX_SHOWN):
            logger.info(
                "prompt %d, sample %d (%d tokens, %s): %s\n%s",
                *(row["global_prompt_index"], row["sample_index"], row["generated_token_count"], row["finish_reason"]),
                *(row["prompt"], row["generated_text"]),
            )


def sampler_steps(settings: SampleLmMultihostConfig) -> list[ExecutorStep]:
    """The DAG of a settings file."""
    model = fetch_step(settings.hf_checkpoint, settings.model, settings.tokenizer)
    generation = settings.build_generation(output_path_of(model))
    marked = {name: versioned(getattr(generation, name)) for name in ("prompts", "sampling", "chat", "compute_dtype")}
    count = generation.prompts.count
    samples = ExecutorStep(
        f"infer{'' if count is None else f'-{count}'}", infer, dataclasses.replace(generation, **marked)
    )
    return [model, samples, ExecutorStep("show_samples", show_samples, ShowSamplesConfig(output_path_of(samples)))]


if __name__ == "__main__":
    settings, flags = parse_command_line_or_exit(SampleLmMultihostConfig, SAMPLE_LM_MULTIHOST, JobFlags)
    main(
        flags,
        steps=sampler_steps(settings),
        description=f"samples of {settings.hf_checkpoint}",
        tracker=settings.trainer.tracker.choice(TITLE),
    )
