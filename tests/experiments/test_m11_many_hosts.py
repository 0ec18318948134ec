"""M11 on 1, 2 and 4 real processes: one plan, equal losses, equal state with and without interleaving or a lost host.

Other failures of one of many processes are tested on a job of the same shape, `tests/distributed/test_jobs.py`.
"""

import json
import pathlib
import re

import pytest

M11 = "experiments/m11_interleave.py"
STEPS = ("fetch_model", "prepare_pairs", "train-2", "infer-128", "train-5", "report")
LOSS_SECONDS = 45


def output(prefix: pathlib.Path, step: str) -> pathlib.Path:
    (folder,) = prefix.glob(f"{step}-*")
    return folder


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digest(prefix: pathlib.Path, step: str) -> str:
    return json.loads((output(prefix, step) / "summary.json").read_text())["state_digest"]


def losses(prefix: pathlib.Path) -> list[float]:
    return [row["loss"] for step in ("train-2", "train-5") for row in rows(output(prefix, step) / "metrics.jsonl")]


def planned(text: str) -> list[tuple[str, ...]]:
    """Return step, action, reason and version of each line of the plan that the leader prints."""
    table = re.findall(rf"({'|'.join(STEPS)})\s+(RUN|SKIP|REPLAY)\s+(\S.*?)\s\s+([0-9a-f]{{8}})\s", text)
    assert [row[0] for row in table] == list(STEPS), text
    return table


@pytest.fixture(scope="module")
def finished(launch, tmp_path_factory):
    """Return a function that gives prefix and output of M11 on `count` processes of two devices, each run once."""
    done: dict[int, tuple[pathlib.Path, str]] = {}

    def run(count: int) -> tuple[pathlib.Path, str]:
        if count not in done:
            prefix = tmp_path_factory.mktemp(f"m11_{count}")
            job = launch(count, M11, "--preset", "tiny", "--prefix", prefix).require_success()
            done[count] = prefix, job.text
        return done[count]

    return run


COUNTS = pytest.mark.parametrize("count", [2, 4])
pytestmark = pytest.mark.slow


def test_interleaving_changes_nothing_on_many_hosts(finished, launch):
    prefix, _ = finished(2)
    launch(2, "experiments/simpo_uninterrupted.py", "--preset", "tiny", "--prefix", prefix).require_success()
    assert digest(prefix, "train-5") == digest(prefix, "train-7")
    assert digest(prefix, "train-5") != digest(prefix, "train-2")


def test_plan_and_losses_equal_those_of_one_process(finished):
    alone, text = finished(1)
    prefix, many_text = finished(4)
    assert planned(many_text) == planned(text)
    assert losses(prefix) == pytest.approx(losses(alone), abs=1e-5)
    assert len(losses(prefix)) == 7


@COUNTS
def test_every_prompt_has_its_row_in_the_file_of_the_host_that_served_it(finished, count):
    prefix, _ = finished(count)
    folder = output(prefix, "infer-128")
    merged = rows(folder / f"all_hosts_merged_of_{count:04d}.jsonl")
    assert [row["global_prompt_index"] for row in merged] == list(range(128))
    for host in range(count):
        own = rows(folder / f"host_{host:04d}_of_{count:04d}.jsonl")
        assert [row["global_prompt_index"] for row in own] == list(
            range(host * 128 // count, (host + 1) * 128 // count)
        )
        assert {(row["process_index"], row["process_count"]) for row in own} == {(host, count)}
    listed = {entry["path"] for entry in json.loads((folder / "manifest.json").read_text())["files"]}
    assert {f"host_{host:04d}_of_{count:04d}.jsonl" for host in range(count)} <= listed


@COUNTS
def test_the_ledgers_of_all_processes_are_equal(finished, count):
    _, text = finished(count)
    pattern = r"launched (\d+) programs over many processes \(ledger (\w+)\) and (\d+) on"
    launches = re.findall(pattern, text)
    print(f"{count} processes: (launches over many processes, digest, launches on own devices) {launches}")
    assert len(launches) == count
    # The moments, 7 updates and the handoff; everything else runs on each host alone.
    assert {(number, name) for number, name, _ in launches} == {("9", launches[0][1])}


def test_a_lost_train_5_is_recomputed_by_a_replay_on_all_hosts(finished, launch):
    prefix, _ = finished(2)
    before = digest(prefix, "train-5")
    (output(prefix, "train-5") / ".executor_status").unlink()
    job = launch(2, M11, "--preset", "tiny", "--prefix", prefix).require_success()
    actions = {step: action for step, action, _, _ in planned(job.text)}
    assert [actions[step] for step in ("train-2", "infer-128", "train-5")] == ["REPLAY", "SKIP", "RUN"]
    assert digest(prefix, "train-5") == before


def test_one_engine_over_all_hosts_generates_from_the_live_trainer_and_leaves_it_unchanged(launch, tmp_path):
    settings = ("--config_path", "experiments/configs/simpo_tiny_train2_infer8_train5.yaml")
    tokens, digests = {}, set()
    for mode in ("host_data_parallel", "global_mesh"):
        flags = ("--prefix", tmp_path / mode, "--tracker", "none", "--trainer.train_batch_size", 4)
        words = (*settings, *flags, "--inference_eval.inference_mode", mode)
        launch(2, "experiments/train_simpo.py", *words).require_success()
        merged = rows(output(tmp_path / mode, "infer-8") / "all_hosts_merged_of_0002.jsonl")
        tokens[mode] = [row["generated_tokens"] for row in merged]
        digests.add(digest(tmp_path / mode, "train-5"))
    assert len(tokens["global_mesh"]) == 8
    # A different order of summation rounds differently, which very rarely changes a sampled token.
    assert sum(a == b for a, b in zip(*tokens.values(), strict=True)) >= 7
    assert len(digests) == 1


def test_a_lost_host_ends_m11_and_the_next_run_reaches_the_same_digest(launch, finished, tmp_path):
    expected = digest(finished(2)[0], "train-5")
    fault = ("kill", "train", 1, "--preset", "tiny", "--prefix", tmp_path)
    job = launch(2, "tests/experiments/m11_with_fault.py", *fault)
    assert job.exit_code != 0
    fault_time = min(map(float, re.findall(r"FAULT (\d+\.\d+)", job.text)))
    assert job.ended - fault_time < LOSS_SECONDS, job.text
    assert (output(tmp_path, "train-5") / ".executor_status").read_text() == "FAILED", job.text
    assert (output(tmp_path, "train-2") / ".executor_status").read_text() == "SUCCESS"
    again = launch(2, M11, "--preset", "tiny", "--prefix", tmp_path).require_success()
    actions = {step: action for step, action, _, _ in planned(again.text)}
    assert [actions[step] for step in ("train-2", "infer-128", "train-5")] == ["REPLAY", "SKIP", "RUN"]
    assert digest(tmp_path, "train-5") == expected
