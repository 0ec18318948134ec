"""Failures of a job on a TPU VM, and how the launcher handles them."""

import dataclasses

import pytest

WHERE = ("--tpu_name", "m11", "--zone", "us-central1-a", "--project", "proj")
FAILS = {"code": 3, "lines": ["step 1", "ValueError: no"]}
SILENT = ("docker logs --follow", "inspect --format")
HANGS = {"hangs": True, "lines": ["waiting"]}
LINES = [f"line {number}" for number in range(9)]


class TestTheCommandFails:
    def test_the_exit_code_and_the_last_lines_are_those_of_the_host_that_failed(self, cloud):
        cloud.has_tpu()
        cloud.plan(containers=[{"1": FAILS}])
        done = cloud.launch("--image", "i")
        assert done.code == 3
        assert "host 1 of 2 exited with code 3; no other host failed before it. Its last lines:" in done.err
        assert "    ValueError: no" in done.err
        assert cloud.finished not in done.out

    def test_the_host_that_failed_first_by_host_clocks_is_named(self, cloud):
        cloud.has_tpu()
        first, later = ({"code": code, "ended": f"2026-01-01T00:00:0{code}.5Z"} for code in (3, 4))
        for hosts, code in (({"0": later, "1": first}, 3), ({"0": first, "1": later}, 3)):
            cloud.plan(containers=[hosts])
            assert cloud.launch("--image", "i", "--run_id", f"host-{hosts['0']['code']}").code == code

    def test_a_container_that_never_ran_did_not_fail_first(self, cloud):
        cloud.has_tpu()
        created = {"code": 128, "ended": "0001-01-01T00:00:00Z"}
        cloud.plan(containers=[{"0": created, "1": FAILS}])
        assert cloud.launch("--image", "i").code == 3

    def test_it_is_reported_even_if_gcloud_fails_afterwards(self, cloud):
        cloud.plan(
            containers=[{"all": FAILS}],
            faults=[{"match": "queued-resources describe", "err": "Reauthentication required", "skip": 4, "times": 99}],
        )
        done = cloud.launch_on_one_host()
        assert done.code == 3 and "    ValueError: no" in done.err
        assert "Could not determine whether the TPU was lost" in done.err and "Reauthentication required" in done.err

    def test_a_healthy_tpu_is_not_recreated_for_it(self, cloud):
        cloud.plan(containers=[{"all": FAILS}])
        assert cloud.launch_on_one_host("--spot", "--retries", "10").code == 3
        assert cloud.state["made"] == 1 and cloud.state["deleted"] == 0

    def test_hosts_that_wait_for_the_one_that_failed_are_stopped(self, cloud):
        cloud.has_tpu()
        cloud.plan(containers=[{"0": HANGS, "1": FAILS}])
        assert cloud.launch("--image", "i").code == 3
        assert cloud.containers(0)[f"simpo-{cloud.run_id}"]["state"] == "exited"

    def test_a_host_that_runs_out_of_memory_is_reported(self, cloud):
        cloud.has_tpu(kind="v5p-8")
        cloud.plan(containers=[{"all": {"code": 137, "oom": True}}])
        done = cloud.launch_on_one_host()
        assert done.code == 137 and "ran out of host memory" in done.err

    def test_its_container_is_kept_and_its_log_is_on_this_machine(self, cloud):
        cloud.has_tpu(kind="v5p-8")
        cloud.plan(containers=[{"all": FAILS}])
        done = cloud.launch_on_one_host("--run_id", "kept-here")
        assert "simpo-kept-here" in cloud.containers(0)
        log = cloud.root / "runs" / "launches" / "kept-here" / "attempt_1" / "host_0.log"
        assert log.read_text().splitlines()[-1] == "ValueError: no" and str(log.parent) in done.err


class TestTheRequest:
    def test_a_failed_request_is_reported_with_its_reason_when_no_retry_is_left(self, cloud):
        cloud.plan(lives=[[["FAILED", None, "no more capacity in the zone"]]])
        done = cloud.launch_on_one_host("--retries", "0")
        assert done.code == 1 and "no more capacity in the zone" in done.err and cloud.state["made"] == 1

    def test_it_is_retried_as_often_as_requested(self, cloud):
        cloud.plan(lives=[[["FAILED", None, "no"]]] * 5)
        done = cloud.launch_on_one_host("--retries", "2")
        assert done.code == 1 and "attempt 3, and --retries is 2" in done.err and cloud.state["made"] == 3

    def test_negative_retries_are_unlimited(self, cloud):
        cloud.plan(lives=[[["FAILED", None, "no"]]] * 4)
        assert cloud.launch_on_one_host("--retries", "-1").code == 0
        assert cloud.state["made"] == 5

    @pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
    def test_a_finished_one_of_an_earlier_launch_is_replaced(self, cloud, state):
        cloud.write(cloud.state | {"request": {"state": state}})
        done = cloud.launch_on_one_host("--retries", "0")
        assert done.code == 0 and "left over from an earlier launch" in done.out and cloud.state["deleted"] == 1

    def test_one_that_is_being_suspended_is_waited_for_and_replaced(self, cloud):
        cloud.write(cloud.state | {"steps": [["SUSPENDING", None], ["SUSPENDING", None], ["SUSPENDED", None]]})
        assert cloud.launch_on_one_host("--retries", "0").code == 0

    def test_one_that_is_being_deleted_is_waited_for(self, cloud):
        cloud.write(cloud.state | {"steps": [["DELETING", None], ["DELETING", None], [None, None]]})
        assert cloud.launch_on_one_host("--retries", "0").code == 0

    def test_one_that_someone_deletes_is_not_recreated(self, cloud):
        cloud.plan(lives=[[["WAITING_FOR_RESOURCES", None], [None, None]]])
        done = cloud.launch_on_one_host()
        assert done.code == 1 and "was deleted by someone" in done.err and cloud.state["made"] == 1

    def test_the_request_is_found_after_a_lost_answer(self, cloud):
        cloud.has_tpu(state="CREATING", kind="v5p-8", request="PROVISIONING")
        cloud.write(cloud.state | {"steps": [["ACTIVE", "READY"]]})
        cloud.plan(faults=[{"match": "queued-resources describe", "err": "503 UNAVAILABLE", "times": 2}])
        assert cloud.launch_on_one_host().code == 0

    def test_a_tpu_that_never_becomes_ready_times_out(self, cloud):
        cloud.plan(lives=[[["PROVISIONING", "CREATING"]]])
        done = cloud.launch_on_one_host("--start_timeout", "5", "--retries", "0")
        assert done.code == 1 and "was not ready 5 s after it left the queue" in done.err

    @pytest.mark.parametrize("life", [["PROVISIONING", "CREATING"], ["ACTIVE", "REPAIRING"]])
    def test_a_tpu_that_is_stuck_is_deleted_before_the_next_is_requested(self, cloud, life):
        cloud.plan(lives=[[life]])
        done = cloud.launch_on_one_host("--start_timeout", "5", "--retries", "1")
        assert done.code == 0, done.err
        assert cloud.state["made"] == 2 and cloud.state["deleted"] == 1

    @pytest.mark.parametrize(
        ("said", "advice"),
        [
            ("RESOURCE_EXHAUSTED: Quota limit", "step 2 of infra/README.md"),
            ("PERMISSION_DENIED: tpu.nodes.create", "step 1 of infra/README.md"),
            ("SERVICE_DISABLED", "gcloud services enable tpu.googleapis.com"),
            ("You do not currently have an active account selected", "gcloud auth login"),
        ],
    )
    def test_a_refusal_comes_with_advice(self, cloud, said, advice):
        cloud.plan(faults=[{"match": "queued-resources create", "err": said}])
        done = cloud.launch_on_one_host("--retries", "0")
        assert done.code == 1 and said in done.err and advice in done.err

    def test_a_create_command_whose_answer_is_lost_is_not_a_failure(self, cloud):
        cloud.plan(faults=[{"match": "queued-resources create", "err": "ALREADY_EXISTS"}])
        cloud.write(cloud.state | {"steps": [[None, None], ["ACTIVE", "READY"]], "made": 1, "wanted": "v5p-8"})
        assert cloud.launch_on_one_host().code == 0


class TestTheTpu:
    def test_one_of_another_type_is_left_alone(self, cloud):
        cloud.has_tpu()
        done = cloud.launch_on_one_host()
        assert done.code == 2 and "is a v5p-16, and --tpu_type requests v5p-8" in done.err
        assert cloud.state["deleted"] == 0

    def test_one_that_was_preempted_before_is_replaced(self, cloud):
        cloud.has_tpu(state="PREEMPTED", kind="v5p-8", request=None)
        assert cloud.launch_on_one_host("--retries", "0").code == 0
        assert cloud.state["deleted"] == 1

    def test_one_that_someone_stopped_is_reported(self, cloud):
        cloud.has_tpu(state="STOPPED", kind="v5p-8")
        done = cloud.launch_on_one_host()
        assert done.code == 1 and "someone stopped it" in done.err

    def test_one_that_is_unhealthy_is_waited_for(self, cloud):
        cloud.has_tpu(kind="v5p-8", health="UNHEALTHY_MAINTENANCE")
        cloud.write(cloud.state | {"steps": [["ACTIVE", "REPAIRING"], ["ACTIVE", "REPAIRING"], ["ACTIVE", "READY"]]})
        done = cloud.launch_on_one_host()
        assert done.code == 0 and "TPU REPAIRING" in done.out

    def test_one_that_is_preempted_more_often_than_retries_allow_is_given_up(self, cloud):
        cloud.plan(containers=[{"all": HANGS | {"preempts": True}}])
        done = cloud.launch_on_one_host("--spot", "--retries", "1")
        assert done.code == 1 and "TPU PREEMPTED" in done.err and "attempt 2, and --retries is 1" in done.err
        assert cloud.finished not in done.out

    def test_one_that_is_deleted_while_the_job_runs_is_not_recreated(self, cloud):
        fault = {"match": "docker logs --follow", "at": "host 0", "kind": "delete"}
        cloud.plan(containers=[{"all": HANGS}], faults=[fault])
        done = cloud.launch_on_one_host("--spot")
        assert done.code == 1 and "was deleted by someone" in done.err and cloud.state["made"] == 1

    def test_one_that_is_preempted_while_hosts_are_prepared_is_recreated(self, cloud):
        fault = {"match": "docker pull", "at": "host 0", "kind": "fail", "code": 1, "err": "connection closed"}
        cloud.plan(faults=[fault])
        cloud.has_tpu(kind="v5p-8")
        cloud.write(cloud.state | {"steps": [["ACTIVE", "READY"], ["SUSPENDED", "PREEMPTED"]]})
        done = cloud.launch_on_one_host("--spot")
        assert done.code == 0 and "Attempt 1 lost its TPU" in done.err, done.err


class TestTheConnection:
    @pytest.fixture(autouse=True)
    def has_tpu(self, cloud):
        cloud.has_tpu(kind="v5p-8")

    def test_hosts_that_do_not_answer_yet_are_waited_for(self, cloud):
        cloud.plan(faults=[{"match": "told", "at": "host 0", "kind": "refuse", "times": 3}])
        assert cloud.launch_on_one_host().code == 0

    def test_a_host_that_never_answers_is_named(self, cloud):
        cloud.plan(faults=[{"match": "told", "at": "host 0", "kind": "refuse", "times": 99}])
        done = cloud.launch_on_one_host("--start_timeout", "5")
        assert done.code == 1 and "host 0 could not be reached by ssh for 5 s" in done.err

    def test_lines_are_printed_once_if_the_connection_breaks_within_a_line(self, cloud):
        fault = {"match": "docker logs --follow", "at": "host 0", "kind": "cut", "lines": 4}
        cloud.plan(containers=[{"all": {"lines": LINES}}], faults=[fault])
        done = cloud.launch_on_one_host()
        assert done.code == 0 and done.host_lines(0) == LINES

    def test_lines_are_printed_once_if_gcloud_repeats_the_command(self, cloud):
        fault = {"match": "docker logs --follow", "at": "host 0", "kind": "repeat", "lines": 4}
        cloud.plan(containers=[{"all": {"lines": LINES}}], faults=[fault])
        done = cloud.launch_on_one_host()
        assert done.code == 0 and done.host_lines(0) == LINES

    def test_logs_that_are_not_followed_are_also_printed_once_if_gcloud_repeats_the_command(self, cloud):
        cloud.plan(containers=[{"all": {"lines": LINES}}])
        cloud.launch_on_one_host()
        cloud.plan(faults=[{"match": "docker logs simpo", "at": "host 0", "kind": "repeat", "lines": 4}])
        done = cloud.call("logs", *WHERE)
        assert done.code == 0 and done.host_lines(0) == LINES

    @pytest.mark.parametrize("early", [False, True])
    def test_a_job_that_gcloud_starts_twice_runs_once_with_all_its_variables(self, cloud, early):
        # Early: the connection breaks before the variables have arrived. Then gcloud's own attempts start nothing.
        cloud.plan(faults=[{"match": "docker run", "at": "host 0", "kind": "repeat", "early": early}])
        assert cloud.launch_on_one_host("-e", "MINE", "all of it").code == 0
        assert len(cloud.state["started"]) == 1
        (container,) = cloud.containers(0).values()
        assert container["environment"]["MINE"] == "all of it"

    def test_a_host_that_stops_responding_is_named_and_the_job_is_left_running(self, cloud):
        silence = [{"match": words, "at": "host 0", "kind": "refuse", "times": 99} for words in SILENT]
        cloud.plan(containers=[{"all": HANGS}], faults=silence)
        done = cloud.launch_on_one_host()
        assert done.code == 1 and "host 0 of 1 stopped responding" in done.err
        assert cloud.containers(0)[f"simpo-{cloud.run_id}"]["state"] == "running"
        assert "may still be running" in done.err

    def test_a_silence_that_ends_is_not_a_failure(self, cloud):
        silence = [{"match": words, "at": "host 0", "kind": "refuse", "times": 2} for words in SILENT]
        cloud.plan(faults=silence)
        cloud.timing = dataclasses.replace(cloud.timing, reach=1e6)
        done = cloud.launch_on_one_host()
        assert done.code == 0 and done.host_lines(0) == ["hello from 0"]


class TestHostsAndImages:
    def test_an_image_that_hosts_cannot_read_is_reported(self, cloud):
        cloud.has_tpu(kind="v5p-8")
        cloud.plan(faults=[{"match": "docker pull", "at": "docker 0", "err": "denied: Permission artifactregistry"}])
        done = cloud.launch_on_one_host()
        assert done.code == 1 and "preparing: host 0 exited with code 1: denied" in done.err

    def test_a_container_that_does_not_start_is_reported(self, cloud):
        cloud.has_tpu(kind="v5p-8")
        cloud.plan(faults=[{"match": "docker run", "at": "docker 0", "code": 125, "err": "no space left on device"}])
        done = cloud.launch_on_one_host()
        assert done.code == 1 and "starting the job: host 0 exited with code 125: no space left" in done.err

    def test_a_job_that_starts_on_some_hosts_only_is_stopped_on_all(self, cloud):
        cloud.has_tpu()
        cloud.plan(
            containers=[{"all": HANGS}], faults=[{"match": "docker run", "at": "docker 1", "code": 125, "err": "no"}]
        )
        done = cloud.launch("--image", "i")
        assert done.code == 1 and "starting the job: host 1 exited with code 125" in done.err
        assert cloud.containers(0)[f"simpo-{cloud.run_id}"]["state"] == "exited"

    def test_an_image_that_cannot_be_built_ends_the_launch_before_any_cost(self, cloud):
        cloud.plan(faults=[{"match": "docker build", "err": "step 3 failed"}])
        done = cloud.launch()
        assert done.code == 1 and "step 3 failed" in done.err and cloud.state["made"] == 0

    def test_an_image_that_cannot_be_pushed_is_reported_with_the_repository_to_create(self, cloud):
        cloud.plan(faults=[{"match": "docker push", "err": 'name unknown: Repository "simpo" not found'}])
        done = cloud.launch()
        assert done.code == 1 and "gcloud artifacts repositories create simpo" in done.err


class TestOtherJobs:
    def test_another_job_that_runs_is_left_alone_and_named(self, cloud):
        cloud.has_tpu(kind="v5p-8")
        cloud.put_container(0, "theirs", state="running")
        done = cloud.launch_on_one_host()
        assert done.code == 1 and "the job theirs is running on host 0" in done.err
        assert cloud.containers(0)["simpo-theirs"]["state"] == "running" and not cloud.state["started"]

    def test_this_job_is_not_started_twice(self, cloud):
        cloud.has_tpu(kind="v5p-8")
        cloud.put_container(0, cloud.run_id, state="running")
        done = cloud.launch_on_one_host()
        assert done.code == 1 and "logs --foreground --tpu_name m11" in done.err
        assert cloud.containers(0)[f"simpo-{cloud.run_id}"]["state"] == "running"

    def test_a_finished_container_of_this_job_is_removed_and_its_log_is_kept(self, cloud):
        cloud.has_tpu(kind="v5p-8")
        cloud.put_container(0, "theirs", lines=["their last words"])
        cloud.put_container(0, cloud.run_id, lines=["my last words"])
        assert cloud.launch_on_one_host().code == 0
        assert cloud.containers(0)["simpo-theirs"]["lines"] == ["their last words"]
        assert cloud.containers(0)[f"simpo-{cloud.run_id}"]["lines"] == ["hello from 0"]
        (log,) = (cloud.home(0) / ".simpo-launch" / cloud.run_id).glob("*.log")
        assert log.read_text() == "my last words\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tpu_type", "v5p-32", "--", "true"], "--backend gke, or --local N"),
        ([*WHERE, "--", "true"], "--tpu_type is missing"),
        ([*WHERE, "--tpu_type", "v9-8", "--", "true"], "'v9-8' is unknown; write KIND-SIZE"),
        ([*WHERE, "--tpu_type", "v5p-24", "--", "true"], "the number of chips must be a power of two"),
        ([*WHERE, "--tpu_type", "v5p-8", "--capacity_type", "cheap", "--", "true"], "Unknown capacity type: cheap"),
        (["--tpu_name", "M11", *WHERE[2:], "--tpu_type", "v5p-8", "--", "true"], "names begin with a lowercase letter"),
        (["--tpu_name", "m", "--zone", "mars", "--project", "p", "--tpu_type", "v5p-8", "--", "true"], "is not a zone"),
        (["--tpu_name", "m", "--tpu_type", "v5p-8", "--", "true"], "Zone must be specified or set in gcloud config"),
        ([*WHERE, "--tpu_type", "v5p-8", "--run_id", "My Run", "--", "true"], "--run_id 'My Run'"),
        ([*WHERE, "--tpu_type", "v5p-8", "-e", "A", "B", "C", "--", "true"], "write -e NAME VALUE"),
        ([*WHERE, "--tpu_type", "v5p-8", "-e", "UNSET_HERE", "--", "true"], "which is not set"),
        ([*WHERE, "--tpu_type", "v5p-8", "-e", "A-B", "C", "--", "true"], "is not a valid variable name"),
        ([*WHERE, "--tpu_type", "v5p-8", "-e", "A", "1\n2", "--", "true"], "a multi-line value"),
        ([*WHERE, "--tpu_type", "v5p-8", "--image", "i", "--no_docker", "--", "true"], "give only one of them"),
        (["--backend", "gke", "--tpu_type", "v5p-8", "--no_docker", "--", "true"], "pods on GKE start from an image"),
        (["--backend", "local", "--", "true"], "--backend local needs --local N"),
        (["--local", "2", "--backend", "gke", "--tpu_type", "v5p-8", "--", "true"], "leave it out for --backend gke"),
        (["stop", *WHERE, "--", "true"], "`stop` takes no command"),
        (["logs", "--local", "2"], "--local"),
        (["stop", "--backend", "gke"], "needs --run_id"),
        ([*WHERE, "--tpu_type", "v5p-8", "--autodelete", "--", "true"], "give --foreground too"),
        (
            [*WHERE, "--tpu_type", "v5p-8", "-e", "XLA_FLAGS", "--xla_foo=1", "--", "true"],
            "a dash as -e NAME=VALUE",
        ),
    ],
)
def test_invalid_arguments_are_reported_and_nothing_is_created(cloud, words, message):
    done = cloud.call(*words)
    assert done.code == 2 and message in done.err, done.err
    assert cloud.state["made"] == 0 and not cloud.state["built"]


def test_a_machine_without_gcloud_reports_what_to_install(cloud, monkeypatch):
    (cloud.folder / "bin" / "gcloud").unlink()
    monkeypatch.setenv("PATH", str(cloud.folder / "bin"))
    done = cloud.launch_on_one_host()
    assert done.code == 2 and "program 'gcloud' was not found; install the Google Cloud CLI" in done.err
