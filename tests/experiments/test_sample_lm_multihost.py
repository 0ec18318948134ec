"""`experiments/sample_lm_multihost.py` as users call it: a settings file yields samples or one clear error."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from simpo_pipeline.data.byte_tokenizer import VOCAB_SIZE, write_byte_tokenizer
from simpo_pipeline.inference.generated_rows import read_finished_rows
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.hf_weights import save_weights

ROOT = pathlib.Path(__file__).parents[2]
LLAMA_8B = "experiments/configs/sample_llama8b_multihost_real_1prompt_2048.yaml"
SMOLLM2 = "experiments/configs/sample_smollm2_1prompt.yaml"
TINY = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    max_seq_len=128,
)


@pytest.fixture
def run(python):
    """Return a function that runs the script to completion."""

    def run_script(*words: str, timeout: int = 60) -> subprocess.CompletedProcess[str]:
        command = [*python, "experiments/sample_lm_multihost.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)

    return run_script


def rows_of(prefix: pathlib.Path) -> list[dict]:
    (merged,) = prefix.glob("infer-*/all_hosts_merged_of_0001.jsonl")
    return [json.loads(line) for line in merged.read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, random_llama) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    write_byte_tokenizer(folder)
    save_weights(folder, random_llama(TINY))
    return folder


@pytest.fixture
def tiny_settings(tmp_path, tiny_model) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(f"""
        hf_checkpoint: {tiny_model}
        prompts: [hello, world]
        n_generations: 2
        max_new_tokens: 6
        engine: {{max_seq_len: 64, page_size: 8, max_seqs: 3}}
        model: {{num_layers: 2, num_kv_heads: 2}}
        inference_mode: host_data_parallel
    """)
    return str(path)


def test_the_dry_run_prints_the_steps_and_touches_nothing(run, tmp_path):
    done = run("--config_path", LLAMA_8B, "--prefix", str(tmp_path / "runs"), "--dry_run")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["fetch_model", "infer-1", "show_samples"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_process_serves_every_sample_of_every_prompt_and_shows_them(run, tmp_path, tiny_settings):
    prefix = tmp_path / "runs"
    done = run("--config_path", tiny_settings, "--prefix", str(prefix), timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Job finished with no error."
    rows = rows_of(prefix)
    keys = [(row["global_prompt_index"], row["sample_index"], row["prompt"]) for row in rows]
    assert keys == [(0, 0, "hello"), (0, 1, "hello"), (1, 0, "world"), (1, 1, "world")]
    assert all(row["generated_token_count"] == 6 or row["finish_reason"] == "stop" for row in rows)
    for row in rows:
        shown = (
            f"prompt {row['global_prompt_index']}, sample {row['sample_index']} ({row['generated_token_count']} tokens"
        )
        assert shown in done.stdout


@pytest.mark.slow
def test_a_killed_job_keeps_its_finished_rows_until_it_runs_again(run, tmp_path, tiny_settings):
    prefix, count = tmp_path / "runs", 150
    words = ["--config_path", tiny_settings, "--prefix", str(prefix), "--prompts", "null"]
    words += ["--synthetic_prompt_count", str(count), "--synthetic_prompt_template", "no {index}"]
    # Started as its own process: with a fork, the kill would reach the client first.
    command = [sys.executable, "experiments/sample_lm_multihost.py", *words]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    unfinished = f"infer-{count}-*/host_0000_of_0001.unfinished.jsonl"
    deadline = time.monotonic() + 120
    while not any(path.read_text().count("\n") >= 40 for path in prefix.glob(unfinished)):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    (path,) = prefix.glob(unfinished)
    aside = {(row["global_prompt_index"], row["sample_index"]): row for row in read_finished_rows(str(path))}
    assert 40 <= len(aside) < 2 * count

    done = run(*words, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["global_prompt_index"], row["sample_index"]): row for row in rows_of(prefix)}
    assert len(rows) == 2 * count
    assert all(rows[key] == row for key, row in aside.items())
    manifest = json.loads((path.parent / "manifest.json").read_text())
    listed = {file["path"] for file in manifest["files"]}
    assert listed == {"host_0000_of_0001.jsonl", "all_hosts_merged_of_0001.jsonl", "summary.json"}
    assert not path.exists()


def test_a_checkpoint_of_another_shape_stops_the_job_before_generation(run, tmp_path, tiny_settings):
    done = run("--config_path", tiny_settings, "--prefix", str(tmp_path / "runs"), "--model.num_kv_heads", "4")
    assert done.returncode == 1
    assert "model.num_kv_heads is 4, but the checkpoint's config.json has 2" in done.stdout
    assert not list((tmp_path / "runs").glob("infer-*/*.jsonl"))


@pytest.mark.parametrize(
    ("line", "key"),
    [("max_prompts_per_batch: 1", "max_prompts_per_batch"), ("  use_logical_reset: true", "engine.use_logical_reset")],
)
def test_a_file_that_has_drifted_is_refused_in_one_sentence(run, line, key, tmp_path, tiny_settings):
    drifted = tmp_path / "drifted.yaml"
    drifted.write_text(f"hf_checkpoint: some/model\nprompts: [hello]\nengine:\n  max_seq_len: 256\n{line}\n")
    done = run("--config_path", str(drifted), "--prefix", str(tmp_path / "runs"))
    assert done.returncode == 2 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"error: {drifted}: {key} is not a setting; ")
    assert sentence.endswith("; see docs/settings.md.")


@pytest.mark.slow
def test_the_smollm2_file_samples_from_the_real_model(run, tmp_path):
    done = run("--config_path", SMOLLM2, "--prefix", str(tmp_path), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = rows_of(tmp_path)
    assert "sleep" in row["generated_text"] and row["generated_text"] in done.stdout
