"""The regular life cycle of a job on a TPU VM, from the request for a TPU to stop and clean."""

import re

import pytest

SPOKEN = {"all": {"lines": ["step 1", "step 2"]}}


def test_a_job_runs_from_the_queue_to_the_last_line_of_all_hosts(cloud):
    cloud.plan(containers=[SPOKEN])
    done = cloud.launch()
    assert done.code == 0, done.err
    assert done.last_line == cloud.finished
    assert [done.host_lines(host) for host in range(2)] == [["step 1", "step 2"]] * 2
    assert cloud.state["made"] == 1 and cloud.state["deleted"] == 0
    for host in range(2):
        container = cloud.containers(host)[f"simpo-{cloud.run_id}"]
        assert container["command"][1:] == ["python", "experiments/m11.py", "--prefix", "gs://bucket/path"]
        assert container["environment"]["JAX_COORDINATOR_PORT"] == "8476"
        assert container["environment"]["RUN_ID"] == cloud.run_id
        assert re.fullmatch(r"[0-9a-f]{40}", container["environment"]["GIT_COMMIT"])


def test_every_state_of_the_queue_is_reported_once(cloud):
    waiting = [["WAITING_FOR_RESOURCES", None]] * 4
    cloud.plan(lives=[[*waiting, ["PROVISIONING", None], ["ACTIVE", "CREATING"], ["ACTIVE", "READY"]]])
    done = cloud.launch_on_one_host()
    assert done.code == 0, done.err
    told = [line for line in done.out.splitlines() if line.startswith("TPU m11: request ")]
    assert told == [
        "TPU m11: request WAITING_FOR_RESOURCES",
        "TPU m11: request PROVISIONING",
        "TPU m11: request ACTIVE; TPU CREATING",
    ]


def test_waiting_in_the_queue_has_no_timeout(cloud):
    cloud.plan(lives=[[["WAITING_FOR_RESOURCES", None]] * 12 + [["ACTIVE", "READY"]]])
    assert cloud.launch_on_one_host("--start_timeout", "5").code == 0


@pytest.mark.parametrize("request_state", ["ACTIVE", None])
def test_a_healthy_tpu_is_used_as_it_is(cloud, request_state):
    cloud.has_tpu(request=request_state, kind="v5p-8")
    done = cloud.launch_on_one_host()
    assert done.code == 0, done.err
    assert not cloud.calls("create") and not cloud.calls("delete")
    assert "exists and is healthy" in done.out


def test_the_same_files_are_built_into_an_image_once(cloud):
    cloud.launch(kind="v5p-8")
    done = cloud.launch(kind="v5p-8")
    assert done.code == 0, done.err
    assert len(cloud.state["built"]) == 1 and len(cloud.state["pushed"]) == 1
    assert "already exists" in done.out


def test_an_image_that_exists_is_used_without_local_docker(cloud):
    done = cloud.launch("--image", "europe-docker.pkg.dev/proj/simpo/image:tag")
    assert done.code == 0, done.err
    assert not cloud.calls("docker") and not cloud.calls("images")
    assert cloud.containers(0)[f"simpo-{cloud.run_id}"]["command"][0] == "europe-docker.pkg.dev/proj/simpo/image:tag"


@pytest.mark.parametrize(
    ("words", "flags", "track"),
    [
        ([], [], "compute"),
        (["--capacity_type", "on-demand"], [], "compute"),
        (["--capacity_type", "spot"], ["--spot"], "compute"),
        (["--capacity_type", "preemptible"], ["--spot"], "compute"),
        (["--preemptible"], ["--spot"], "compute"),
        (["--spot"], ["--spot"], "compute"),
        (["--reserved"], ["--reserved"], "compute"),
        (["--capacity_type", "best-effort"], ["--best-effort"], "alpha"),
    ],
)
def test_capacity_types_and_their_aliases(cloud, words, flags, track):
    done = cloud.call("--dry_run", *cloud.where, "--tpu_type", "v5p-16", *words, "--", "true")
    assert done.code == 0, done.err
    (create,) = [line.split() for line in done.out.splitlines() if "queued-resources create" in line]
    assert create[1] == track
    assert [word for word in create if word in ("--spot", "--reserved", "--best-effort")] == flags


def test_success_after_a_lost_tpu_is_success(cloud):
    # Host 0's lines are read before it preempts the TPU. If both hosts did, either could be the first.
    lost = {"0": {"hangs": True, "preempts": True, "lines": ["step 1"]}, "1": {"hangs": True}}
    cloud.plan(containers=[lost, SPOKEN])
    done = cloud.launch("--spot")
    assert done.code == 0, done.err
    assert done.last_line == cloud.finished
    assert cloud.state["made"] == 2 and cloud.state["deleted"] == 1
    assert "Attempt 1 lost its TPU" in done.err
    assert len(cloud.state["built"]) == 1
    logs = cloud.root / "runs" / "launches" / cloud.run_id
    assert (logs / "attempt_1" / "host_0.log").read_text().splitlines()[-1] == "step 1"
    assert (logs / "attempt_2" / "host_0.log").read_text().splitlines()[-2:] == ["step 1", "step 2"]


def test_all_attempts_of_a_job_have_one_name(cloud):
    cloud.plan(containers=[{"all": {"hangs": True, "preempts": True}}, {}])
    assert cloud.launch_on_one_host("--spot", "--run_id", "my-run").code == 0
    assert {(life, name) for life, _, name in cloud.state["started"]} == {("1", "simpo-my-run"), ("2", "simpo-my-run")}


def test_a_host_that_fails_because_the_tpu_is_preempted_is_not_a_failure_of_the_job(cloud):
    # The container's exit is noticed before the cloud reports the reason.
    cloud.plan(containers=[{"0": {"code": 1, "preempts": True}, "1": {"hangs": True}}, {}])
    done = cloud.launch("--spot")
    assert done.code == 0, done.err
    assert cloud.state["made"] == 2


def test_a_detached_launch_prints_how_to_follow_and_all_commands_work_by_name(cloud):
    cloud.plan(containers=[{"all": {"hangs": True, "lines": ["step 1"]}}])
    done = cloud.call(*cloud.where, "--tpu_type", "v5p-16", "--", "true")
    assert done.code == 0, done.err
    for word in ("logs --foreground", "status", "stop", "clean"):
        assert f"python infra/launch.py {word} --tpu_name m11 --zone us-central1-a --project proj" in done.out
    status = cloud.call("status", *cloud.where).out
    assert "request  ACTIVE" in status and "host 1   true-" in status and ": running" in status
    assert cloud.call("stop", *cloud.where).code == 0
    assert cloud.call("logs", *cloud.where).host_lines(1) == ["step 1"]
    followed = cloud.call("logs", "--foreground", *cloud.where)
    assert followed.code == 137 and "exited with code 137" in followed.err
    assert "it is no longer billed" in cloud.call("clean", *cloud.where).out
    assert cloud.state["node"] is None
    assert "it costs nothing" in cloud.call("clean", *cloud.where).out
    assert "it costs nothing" in cloud.call("status", *cloud.where).out


def test_logs_in_the_foreground_exit_like_the_job(cloud):
    cloud.plan(containers=[SPOKEN])
    cloud.call(*cloud.where, "--tpu_type", "v5p-16", "--", "true")
    done = cloud.call("logs", "--foreground", *cloud.where)
    assert done.code == 0 and done.last_line == cloud.finished
    assert done.host_lines(1) == ["step 1", "step 2"]


def test_autodelete_deletes_the_tpu_after_success_and_after_failure(cloud):
    assert cloud.launch_on_one_host("--autodelete").code == 0
    assert cloud.state["node"] is None
    cloud.plan(containers=[{"0": {"code": 2}}])
    assert cloud.launch_on_one_host("--autodelete").code == 2
    assert cloud.state["node"] is None


def test_zone_and_project_come_from_gcloud(cloud):
    cloud.plan(config={"compute/zone": "us-east5-a", "project": "theirs"})
    done = cloud.call("--dry_run", "--tpu_name", "m11", "--tpu_type", "v5p-16", "--", "true")
    (create,) = [line.split() for line in done.out.splitlines() if "queued-resources create" in line]
    assert create[create.index("--zone") + 1] == "us-east5-a"
    assert create[create.index("--project") + 1] == "theirs"


def test_without_docker_the_tracked_files_run_in_their_own_environment(cloud):
    code = "import os; print(os.environ['JAX_COORDINATOR_PORT'], sorted(os.listdir('.')))"
    done = cloud.launch("--no_docker", job=("--", "python", "-c", code))
    assert done.code == 0, done.err
    assert done.host_lines(1) == ["8476 ['.gitignore', '.venv', 'experiments', 'uv_was_called_with']"]
    (folder,) = (cloud.home(1) / ".simpo-launch").glob("python-*")
    called = (folder / "source" / "uv_was_called_with").read_text().strip()
    assert called == "sync --quiet --python 3.11 --extra tpu --no-default-groups"
    assert not (folder / "environment").exists()
    assert not cloud.calls("docker")


def test_without_docker_a_failure_is_reported_and_its_log_is_kept(cloud):
    job = ("--", "python", "-c", "import sys; print('first'); sys.exit(7)")
    done = cloud.launch("--no_docker", "--run_id", "mine", job=job)
    assert done.code == 7 and "    first" in done.err
    assert cloud.launch("--no_docker", "--run_id", "mine", job=("--", "python", "-c", "print('second')")).code == 0
    folder = cloud.home(0) / ".simpo-launch" / "mine"
    assert (folder / "kept-1.log").read_text() == "first\n"
    assert (folder / "log").read_text() == "second\n"


def test_without_docker_a_detached_job_is_found_refused_and_stopped(cloud):
    job = ("--tpu_type", "v5p-16", "--no_docker", "--", "python", "-c", "import time; print('up'); time.sleep(100)")
    assert cloud.call(*cloud.where, *job).code == 0
    assert ": running" in cloud.call("status", *cloud.where).out
    again = cloud.call(*cloud.where, *job)
    assert again.code == 1 and "is running on host 0" in again.err
    assert cloud.call("stop", *cloud.where).code == 0
    assert "exited, exit code 137" in cloud.call("status", *cloud.where).out
