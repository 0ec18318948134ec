"""The sampler on several real processes, in both modes: the same tokens as one process, for any sharding."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis, NamedArray

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.transformer import abstract_llama, attend_whole_sequences, logits, transform
from simpo_pipeline.storage.output_folder import OutputFolder
from steps.make_model import MakeModelConfig, make_model

SAMPLER = "experiments/sample_lm_multihost.py"
# One key/value head for each device of four processes, and random weights large enough that greedy tokens do not
# depend on rounding.
MODEL = LlamaConfig(64, 128, 2, 16, 8, 8, 264, 512, tie_word_embeddings=True, initializer_range=0.2)
TIE = 1e-4
YAML = """
hf_checkpoint: {model}
chat: true
max_new_tokens: 12
temperature: {temperature}
inference_mode: {mode}
engine: {{max_seq_len: 384, page_size: 16, max_seqs: 64}}
synthetic_prompt_count: {count}
synthetic_prompt_template: "Prompt {{index}}: name one thing."
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("model") / "out")
    make_model(MakeModelConfig(MODEL), OutputFolder(path))
    return path


@pytest.fixture(scope="module")
def rows(launch, model, tmp_path_factory):
    """Return a function that gives the merged rows of a run; each run is made once."""
    done: dict[tuple, list[dict]] = {}

    def run(processes: int, mode: str, *, count: int = 130, temperature: float = 0.7) -> list[dict]:
        key = (processes, mode, count, temperature)
        if key not in done:
            folder = tmp_path_factory.mktemp("samples")
            text = YAML.format(model=model, mode=mode, count=count, temperature=temperature)
            (folder / "settings.yaml").write_text(text)
            flags = ("--config_path", folder / "settings.yaml", "--prefix", folder / "out", "--tracker", "none")
            launch(processes, SAMPLER, *flags).require_success()
            (output,) = (folder / "out").glob(f"infer-{count}-*")
            check_files(output, processes, count)
            done[key] = read(output / f"all_hosts_merged_of_{processes:04d}.jsonl")
        return done[key]

    return run


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_files(output: pathlib.Path, processes: int, count: int) -> None:
    """Check that each host wrote its contiguous shard and that the merged file has all rows in order."""
    merged = read(output / f"all_hosts_merged_of_{processes:04d}.jsonl")
    assert [row["global_prompt_index"] for row in merged] == list(range(count))
    own = [row for host in range(processes) for row in read(output / f"host_{host:04d}_of_{processes:04d}.jsonl")]
    assert own == merged
    assert json.loads((output / "summary.json").read_text())["prompts"] == count


def tokens(found: list[dict]) -> list[list[int]]:
    return [row["generated_tokens"] for row in found]


@pytest.mark.slow
def test_one_engine_per_host_draws_the_tokens_of_one_process(rows):
    assert tokens(rows(4, "host_data_parallel")) == tokens(rows(1, "host_data_parallel"))


@pytest.mark.slow
def test_an_empty_shard_changes_nothing_for_the_others(rows):
    found = rows(4, "host_data_parallel", count=3)
    assert len(found) == 3
    assert tokens(found) == tokens(rows(1, "host_data_parallel", count=3))


@pytest.mark.slow
def test_one_engine_over_all_hosts_draws_the_same_tokens_except_at_ties(rows, model):
    alone = rows(1, "host_data_parallel", temperature=0.0)
    together = rows(4, "global_mesh", temperature=0.0)
    ties = 0
    for one, many in zip(alone, together, strict=True):
        if one["generated_tokens"] != many["generated_tokens"]:
            assert gap_at_divergence(model, one, many) < TIE
            ties += 1
    print(f"{ties} of {len(alone)} prompts diverge at a tie within {TIE}")
    assert ties < len(alone) // 10


@pytest.mark.slow
def test_a_prompt_that_one_host_cannot_serve_stops_all_hosts_before_any_device_work(launch, model, tmp_path):
    long = "x" * 400
    text = YAML.format(model=model, mode="host_data_parallel", count=1, temperature=0.0)
    text = text[: text.index("synthetic_prompt_count")] + f'prompts: ["short", "{long}"]\n'
    (tmp_path / "settings.yaml").write_text(text)
    flags = ("--config_path", tmp_path / "settings.yaml", "--prefix", tmp_path / "out", "--tracker", "none")
    job = launch(2, SAMPLER, *flags)
    assert job.exit_code == 1
    for host in (0, 1):
        printed = "\n".join(job.lines(host))
        assert "(process 1 of 2): CapacityError: request 0 (prompt 1, sample 0) has 4" in printed
        assert "engine.max_seq_len is 384: raise it, up to the model's limit, or request fewer tokens" in printed
        assert "compiled" not in printed


def gap_at_divergence(model: str, one: dict, many: dict) -> float:
    """Return the gap between the logits of the first two different tokens, computed over the whole sequence in fp32."""
    from simpo_pipeline.data.chat import encode_chat, load_tokenizer
    from simpo_pipeline.data.records import Message

    pairs = zip(one["generated_tokens"], many["generated_tokens"], strict=False)
    at = next(index for index, (a, b) in enumerate(pairs) if a != b)
    tokenizer = load_tokenizer(model)
    prompt = encode_chat(tokenizer, [Message("user", one["prompt"])], add_generation_prompt=True)
    seen = np.array([*prompt, *one["generated_tokens"][:at]], np.int32)
    llama = load_weights(model, abstract_llama(load_config(model), jnp.float32))
    position = Axis("position", len(seen))

    def last_logits(llama, seen):
        axes = (Axis("sequence", 1), position)
        where = NamedArray(jnp.arange(len(seen), dtype=jnp.int32)[None], axes)
        hidden, _ = transform(
            llama, NamedArray(seen[None], axes), where, attend=attend_whole_sequences, state=(), dtype=jnp.float32
        )
        return logits(llama, hidden).array[0, -1]

    found = np.asarray(jax.jit(last_logits)(llama, seen))
    return float(abs(found[one["generated_tokens"][at]] - found[many["generated_tokens"][at]]))
