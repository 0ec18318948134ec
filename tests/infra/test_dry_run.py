"""The output of `--dry_run`: it matches golden files, and a real run uses the same commands.

A test whose output differs leaves the output in its temporary folder, for inspection or to be moved to `golden/`.
"""

import pathlib
import shlex

import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"
WHERE = ("--tpu_name", "m11", "--zone", "us-central1-a", "--project", "proj")
# The command line of an earlier launcher, with names that Google Cloud accepts.
ORIGINAL = (
    "--foreground --zone us-central1-a --tpu_name m11 --tpu_type v5p-32 --capacity_type on-demand -- "
    "python experiments/m11_interleave.py --preset llama3_8b_v5p_32 --prefix gs://bucket/path"
).split()
GKE = "--foreground --backend gke --tpu_type v5p-32 --spot --cluster tpus --zone us-central1-a --run_id m11".split()

CASES = {
    "tpu_vm_original": ["--dry_run", "--project", "proj", *ORIGINAL],
    "tpu_vm_no_docker": ["--dry_run", *WHERE, "--tpu_type", "v5p-8", "--spot", "--no_docker", "--", "python", "a b.py"],
    "tpu_vm_best_effort": [
        *("--dry_run", *WHERE, "--tpu_type", "v6e-8", "--capacity_type", "best-effort"),
        *("--service_account", "runner@proj.iam.gserviceaccount.com", "--image", "proj/image:tag", "-e", "A", "it's"),
        *("--", "python", "-c", "print('$HOME')"),
    ],
    "gke": ["--dry_run", "--project", "proj", *GKE, "--", "python", "experiments/m11.py", "it's"],
    "logs": ["logs", "--dry_run", *WHERE],
    "logs_foreground": ["logs", "--dry_run", "--foreground", *WHERE],
    "status": ["status", "--dry_run", *WHERE],
    "stop": ["stop", "--dry_run", *WHERE],
    "clean": ["clean", "--dry_run", *WHERE],
    "gke_clean": ["clean", "--dry_run", "--backend", "gke", "--run_id", "m11"],
}


@pytest.mark.parametrize("name", CASES)
def test_the_commands_match_the_golden_file(cloud, name, tmp_path):
    done = cloud.call(*CASES[name])
    assert done.code == 0, done.err
    golden = GOLDEN / f"{name}.txt"
    (tmp_path / golden.name).write_text(done.out)
    assert golden.exists() and done.out == golden.read_text(), f"compare {tmp_path / golden.name} with {golden}"


def test_a_dry_run_changes_nothing_and_asks_nothing(cloud):
    cloud.call(*CASES["tpu_vm_original"])
    assert not cloud.state["calls"]


def test_a_dry_run_does_not_claim_that_a_job_has_finished(cloud):
    done = cloud.call(*CASES["tpu_vm_original"])
    assert done.last_line == "# Dry run: nothing was changed." and cloud.finished not in done.out


@pytest.mark.parametrize("flags", [(), ("--no_docker",)])
def test_a_run_uses_the_commands_that_a_dry_run_prints(cloud, flags):
    flags = (*flags, "--run_id", "same")
    printed = cloud.launch("--dry_run", *flags, kind="v5p-8", job=("--", "true")).out.splitlines()
    dry = [shlex.split(line.partition("  < ")[0]) for line in printed if not line.startswith("#")]
    assert cloud.launch(*flags, kind="v5p-8", job=("--", "true")).code == 0
    once = [words for number, words in enumerate(dry) if words not in dry[:number]]
    real = cloud.calls()
    assert [words for number, words in enumerate(real) if words not in real[:number]] == once


def test_the_commands_of_a_dry_run_can_be_pasted_into_a_shell(cloud):
    printed = cloud.call(*CASES["tpu_vm_best_effort"]).out
    (start,) = [line for line in printed.splitlines() if "docker run" in line]
    script = shlex.split(start.partition("  < ")[0])[-1]
    command = script.partition("proj/image:tag")[2].partition(" > /dev/null")[0]
    assert shlex.split(command) == ["python", "-c", "print('$HOME')"]
