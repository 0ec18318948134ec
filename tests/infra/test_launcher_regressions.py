"""Regression tests for the faults of an earlier launcher.

Row numbers refer to its list of failures; defect numbers refer to faults found by reading its code.
"""

import json
import pathlib
import re
import subprocess
import sys

import pytest

FAILS = {"all": {"code": 3, "lines": ["Traceback", "ValueError: no"]}}
SECRETS = {"HF_TOKEN": "hf_verysecret", "WANDB_API_KEY": "wandb-verysecret", "MY_PASSWORD": "pw-verysecret"}


@pytest.fixture(autouse=True)
def has_tpu(cloud):
    cloud.has_tpu(kind="v5p-8")


def container(cloud):
    (found,) = cloud.containers(0).values()
    return found


def test_defect_1_success_after_the_last_retry_is_success(cloud):
    # The failure of an earlier attempt used to be remembered.
    cloud.plan(containers=[{"all": {"hangs": True, "preempts": True}}, {}])
    done = cloud.launch_on_one_host("--spot", "--retries", "1")
    assert done.code == 0 and done.last_line == cloud.finished


def test_defect_2_a_detached_launch_does_not_say_that_the_job_has_finished(cloud):
    cloud.plan(containers=[{"all": {"hangs": True}}])
    done = cloud.call(*cloud.where, "--tpu_type", "v5p-8", "--image", "i", "--", "true")
    assert done.code == 0 and "finished" not in done.out
    assert "keeps running without this terminal" in done.out


@pytest.mark.parametrize("flags", [(), ("--no_docker",)])
def test_defect_3_the_command_arrives_word_for_word(cloud, flags):
    words = ["a b", "$HOME", "'", '"', "*", ";", "&& false", "--x={1: 2}", "", "a\\b", "`false`", "ä", "!"]
    job = ("--", "python", "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *words)
    image = () if flags else ("--image", "i")
    done = cloud.launch(*flags, *image, kind="v5p-8", job=job)
    assert done.code == 0, done.err
    if flags:
        assert json.loads(done.host_lines(0)[0]) == words
    else:
        assert container(cloud)["command"][4:] == words


@pytest.mark.parametrize("flags", [(), ("--no_docker",)])
def test_defect_3_the_variables_arrive_as_they_are(cloud, flags):
    value = 'it\'s "$HOME" * `false` \\ {1}; = ä'
    job = ("--", "python", "-c", "import os; print(os.environ['MINE'])")
    done = cloud.launch("-e", "MINE", value, *(flags or ("--image", "i")), kind="v5p-8", job=job)
    assert done.code == 0, done.err
    assert (done.host_lines(0)[0] if flags else container(cloud)["environment"]["MINE"]) == value


@pytest.mark.parametrize("job", [(), ("--",), ("--", "")])
def test_defect_4_a_launch_without_a_command_reports_what_is_missing(cloud, job):
    done = cloud.launch_on_one_host(job=job)
    assert done.code == 2 and "the command is missing; write it after --" in done.err


def test_defect_5_help_needs_neither_gcloud_nor_credentials(cloud, monkeypatch):
    monkeypatch.setenv("PATH", "")
    done = cloud.call("--help")
    assert done.code == 0 and "--capacity_type" in done.out
    assert not cloud.state["calls"]


def test_defect_6_a_second_launch_does_not_end_the_first(cloud):
    cloud.put_container(0, "first", state="running")
    assert cloud.launch_on_one_host("--run_id", "second").code == 1
    assert cloud.containers(0)["simpo-first"]["state"] == "running"


def test_defect_7_the_log_of_a_failed_attempt_outlives_the_next(cloud):
    cloud.plan(containers=[FAILS])
    assert cloud.launch_on_one_host().code == 3
    assert cloud.launch_on_one_host().code == 3
    (kept,) = (cloud.home(0) / ".simpo-launch" / cloud.run_id).glob("*.log")
    assert kept.read_text() == "Traceback\nValueError: no\n"


def test_defect_8_node_count_is_refused_where_it_would_mean_four_slices(cloud):
    done = cloud.launch("--node_count", "4", kind="v5p-32")
    assert done.code == 2
    assert "--node_count 4 requests 4 slices of v5p-32, not hosts" in done.err
    assert "leave it out" in done.err


def test_row_26_a_failed_job_is_not_restarted_over_its_log(cloud):
    cloud.plan(containers=[FAILS])
    done = cloud.launch_on_one_host("--retries", "10")
    assert done.code == 3 and len(cloud.state["started"]) == 1
    assert container(cloud)["lines"] == ["Traceback", "ValueError: no"]


def test_row_26_the_tpu_driver_reports_why_it_halts(cloud):
    assert cloud.launch_on_one_host().code == 0
    environment = container(cloud)["environment"]
    assert environment["TPU_MIN_LOG_LEVEL"] == environment["TPU_STDERR_LOG_LEVEL"] == "0"


def test_row_27_flags_of_the_launcher_after_the_dashes_are_refused(cloud):
    done = cloud.launch_on_one_host(job=("--", "-e", "HF_TOKEN", "x", "python", "a.py"))
    assert done.code == 2 and "flags of the launcher, such as -e, go before --" in done.err


@pytest.mark.parametrize("words", [["untracked.yaml"], ["--config_path=untracked.yaml"]])
def test_row_27_a_file_that_is_not_shipped_is_found_before_anything_starts(cloud, words):
    done = cloud.launch("--no_docker", kind="v5p-8", job=("--", "python", "a.py", *words))
    assert done.code == 2 and "git add untracked.yaml" in done.err
    assert not cloud.state["started"]


def test_row_27_a_file_of_this_machine_is_found_before_anything_starts(cloud, tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    done = cloud.launch("--no_docker", kind="v5p-8", job=("--", "python", "a.py", str(tmp_path / "config.yaml")))
    assert done.code == 2 and "a file on this machine that the hosts do not have" in done.err


def test_row_27_a_transfer_guard_that_jax_does_not_survive_is_refused(cloud):
    done = cloud.launch_on_one_host("-e", "JAX_TRANSFER_GUARD", "disallow")
    assert done.code == 2 and "leave it out" in done.err
    # A variable that is set on this machine is not forwarded by itself.
    assert cloud.launch_on_one_host(variables={"JAX_TRANSFER_GUARD": "disallow"}).code == 0
    assert "JAX_TRANSFER_GUARD" not in container(cloud)["environment"]


def test_row_43_success_after_a_retry_detached_and_quoting(cloud):
    # All three at once.
    cloud.plan(lives=[[["SUSPENDED", None]]], containers=[{"all": {"hangs": True}}])
    cloud.write(cloud.state | {"node": None, "request": None, "made": 0})
    done = cloud.call(*cloud.where, "--tpu_type", "v5p-8", "--image", "i", "--", "echo", "a b; exit 1")
    assert done.code == 0 and "Attempt 1 lost its TPU" in done.err and "finished" not in done.out
    (found,) = cloud.containers(0, life=2).values()
    assert found["command"][1:] == ["echo", "a b; exit 1"]


class TestSecrets:
    @pytest.mark.parametrize("flags", [("--image", "i"), ("--no_docker",)])
    def test_they_reach_the_job_and_no_command_file_or_line_shows_them(self, cloud, flags):
        # The job itself prints a secret.
        cloud.plan(containers=[{"all": {"lines": ["my token is hf_verysecret"]}}])
        job = ("--", "python", "-c", "import os; print('my token is', os.environ['HF_TOKEN'])")
        flags = ("-e", "MY_PASSWORD", *flags, "--run_id", "secret")
        done = cloud.launch(*flags, kind="v5p-8", job=job, variables=SECRETS)
        assert done.code == 0, done.err
        assert done.host_lines(0) == ["my token is ***"]
        assert "verysecret" not in done.out + done.err + cloud.everything_said()
        kept = [*(cloud.root / "runs").rglob("*.log"), *(cloud.home(0) / ".simpo-launch" / "secret").glob("env*")]
        assert not [path for path in kept if "verysecret" in path.read_text()]
        if "--image" in flags:
            given = container(cloud)["environment"]
            assert {name: given[name] for name in SECRETS} == SECRETS

    def test_later_commands_do_not_show_them_either(self, cloud):
        cloud.plan(containers=[{"all": {"lines": ["my token is hf_verysecret"]}}])
        assert cloud.launch("--image", "i", kind="v5p-8", variables=SECRETS).code == 0
        where = ("--tpu_name", "m11", "--zone", "us-central1-a", "--project", "proj")
        for flags in ((), ("--foreground",)):
            done = cloud.call("logs", *flags, *where, variables=SECRETS)
            assert done.host_lines(0) == ["my token is ***"]
        assert not [path for path in (cloud.root / "runs").rglob("*.log") if "verysecret" in path.read_text()]

    def test_a_dry_run_names_them_only(self, cloud):
        done = cloud.launch("--dry_run", "--image", "i", "-e", "MY_PASSWORD", variables=SECRETS)
        assert "HF_TOKEN" in done.out and "verysecret" not in done.out + done.err

    def test_one_on_the_command_line_gives_a_warning(self, cloud):
        done = cloud.launch_on_one_host("-e", "WANDB_API_KEY", "wandb-verysecret")
        assert done.code == 0 and "export it and write `-e WANDB_API_KEY`" in done.err
        assert "verysecret" not in done.out + done.err + cloud.everything_said()

    def test_the_file_that_contains_them_is_deleted_if_the_start_fails(self, cloud):
        cloud.plan(faults=[{"match": "docker run", "at": "docker 0", "code": 125, "err": "no"}])
        assert cloud.launch_on_one_host(variables=SECRETS).code == 1
        assert not list(cloud.home(0).rglob("environment"))

    def test_the_file_that_contains_them_is_readable_by_its_owner_only(self, cloud):
        script = "umask 077 && cat >"
        assert cloud.launch_on_one_host().code == 0
        assert any(script in word for words in cloud.calls("ssh") for word in words)


def test_the_launcher_imports_only_the_standard_library():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import launcher.application; print(*sys.modules)"
    infra = str(pathlib.Path(__file__).resolve().parents[2] / "infra")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, infra], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\blauncher\.gke\b", done.stdout)


def test_a_word_too_long_for_a_file_name_is_not_a_file(cloud):
    assert cloud.launch("--run_id", "long", kind="v5p-8", job=("--", "python", "-c", "pass;" * 100)).code == 0
