"""The life cycle of a job on GKE and its failures, with a fake kubectl."""

import pytest

CLUSTER = ("--backend", "gke", "--namespace", "team")
SPOKEN = {"lines": ["step 1", "step 2"]}
FAILS = {"code": 3, "lines": ["ValueError: no"]}


@pytest.fixture
def launch(cloud):
    def run(*flags: str, run_id: str = "m11", **more):
        words = ("--foreground", *CLUSTER, "--tpu_type", "v5p-16", "--image", "proj/image:tag", "--run_id", run_id)
        return cloud.call(*words, *flags, "--", "python", "experiments/m11.py", "a b", **more)

    return run


def test_a_job_runs_from_the_queue_to_the_last_line_of_all_hosts(cloud, launch):
    cloud.plan(attempts=[{"suspended": 2, "pending": 2, "pods": {"0": SPOKEN, "1": SPOKEN}, "end": "Completed"}])
    done = launch()
    assert done.code == 0, done.err
    assert done.last_line == cloud.finished
    assert [done.host_lines(host) for host in range(2)] == [["step 1", "step 2"]] * 2
    assert "waiting in the queue, 0 of 2 pods have started" in done.out
    pod = cloud.state["jobset"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == ["python", "experiments/m11.py", "a b"]


def test_the_manifest_leaves_queueing_to_kueue_and_restarts_to_jobset(cloud, launch):
    launch("--spot", "--retries", "4", "--queue", "ours", "--service_account", "runner")
    made = cloud.state["jobset"]
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ours"
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 4
    slice_job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (slice_job["parallelism"], slice_job["completions"], slice_job["backoffLimit"]) == (2, 2, 0)
    pod = slice_job["template"]["spec"]
    assert pod["serviceAccountName"] == "runner"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x2",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


def test_success_after_a_lost_attempt_is_success(cloud, launch):
    lost = {"pods": {"0": {"code": 143}, "1": {"code": 137}}, "end": "restart"}
    cloud.plan(attempts=[lost, {"suspended": 1, "pods": {"0": SPOKEN, "1": SPOKEN}, "end": "Completed"}])
    done = launch()
    assert done.code == 0, done.err
    assert "Attempt 1 was lost; JobSet restarts the job." in done.err
    assert done.last_line == cloud.finished and done.host_lines(1)[-2:] == ["step 1", "step 2"]


def test_a_program_that_fails_ends_the_jobset_and_is_reported(cloud, launch):
    cloud.plan(attempts=[{"pods": {"1": FAILS}, "end": "Failed", "message": "jobset failed by PodFailurePolicy"}])
    done = launch()
    assert done.code == 3
    assert "jobset failed by PodFailurePolicy" in done.err and "    ValueError: no" in done.err
    assert cloud.finished not in done.out


def test_a_pod_that_runs_out_of_memory_is_reported(cloud, launch):
    pod = {"code": 137, "reason": "OOMKilled"}
    cloud.plan(attempts=[{"pods": {"0": pod}, "end": "Failed", "message": "m"}])
    done = launch()
    assert done.code == 137 and "ran out of host memory" in done.err


def test_an_unreadable_image_is_reported_while_pods_wait(cloud, launch):
    cloud.plan(attempts=[{"pending": 99, "waiting": "ImagePullBackOff", "end": "Completed"}])
    done = launch()
    assert done.code == 1 and "ImagePullBackOff" in done.err and "describe pod" in done.err


def test_pods_that_never_start_time_out(cloud, launch):
    cloud.plan(attempts=[{"pending": 999, "end": "Completed"}])
    done = launch("--start_timeout", "5")
    assert done.code == 1 and "5 s after Kueue admitted it" in done.err


def test_waiting_in_the_queue_has_no_timeout(cloud, launch):
    cloud.plan(attempts=[{"suspended": 12, "end": "Completed"}])
    assert launch("--start_timeout", "5").code == 0


def test_a_jobset_that_exists_is_not_started_twice(cloud, launch):
    cloud.plan(attempts=[{"end": "Completed"}])
    assert cloud.call(*CLUSTER, "--tpu_type", "v5p-16", "--image", "i", "--run_id", "m11", "--", "true").code == 0
    done = launch()
    assert done.code == 1 and "already exists" in done.err


def test_a_finished_jobset_is_replaced_and_its_logs_are_kept(cloud, launch):
    cloud.plan(attempts=[{"pods": {"0": FAILS, "1": FAILS}, "end": "Failed"}])
    assert launch(run_id="again").code == 3
    assert launch(run_id="again").code == 3
    kept = list((cloud.root / "runs" / "launches" / "again").glob("again-slice-0-*.log"))
    assert len(kept) == 2 and kept[0].read_text() == "ValueError: no\n"


@pytest.mark.parametrize(
    ("match", "said", "advice"),
    [
        ("create", 'no matches for kind "JobSet"', "The cluster lacks JobSet"),
        ("create", "Forbidden: cannot create", "lacks the permission"),
        ("get jobset", "error: current-context is not set", "give --cluster NAME"),
    ],
)
def test_a_refusal_comes_with_advice(cloud, launch, match, said, advice):
    cloud.plan(faults=[{"match": match, "err": said}])
    done = launch()
    assert done.code == 1 and said in done.err and advice in done.err


def test_a_jobset_whose_secret_cannot_be_created_is_deleted(cloud, launch):
    cloud.plan(faults=[{"match": "create", "err": "Forbidden: secrets", "skip": 1}])
    done = launch()
    assert done.code == 1 and "Forbidden: secrets" in done.err
    assert cloud.state["jobset"] is None


def test_the_cluster_does_not_expand_dollar_signs(cloud):
    script = "echo $$ $(RUN_ID) $HOME"
    words = (*CLUSTER, "--tpu_type", "v5p-16", "--image", "i", "--run_id", "m11", "--", "sh", "-c", script)
    assert cloud.call(*words).code == 0
    pod = cloud.state["jobset"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][-1] == "echo $$$$ $$(RUN_ID) $$HOME"


def test_running_out_of_memory_does_not_restart_the_job(cloud, launch):
    launch()
    slice_job = cloud.state["jobset"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    rules = {rule["action"]: rule for rule in slice_job["podFailurePolicy"]["rules"]}
    assert 137 not in rules["FailJob"]["onExitCodes"]["values"]


@pytest.mark.parametrize(("answer", "is_there"), [("y", False), ("n", True)])
def test_ctrl_c_also_asks_before_the_job_has_its_variables(cloud, launch, answer, is_there, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.gke.secret_manifest", interrupted)
    cloud.answers = [answer]
    assert launch().code == 130
    assert (cloud.state["jobset"] is not None) == is_there


def test_transient_errors_of_the_cluster_are_waited_out(cloud, launch):
    cloud.plan(faults=[{"match": "get jobset", "err": "i/o timeout", "times": 2}])
    assert launch().code == 0


def test_a_jobset_that_someone_deletes_is_reported(cloud, launch):
    cloud.plan(faults=[{"match": "get pods", "err": "ignored", "times": 0}], attempts=[{"suspended": 99}])
    cloud.interrupt_when = None
    looks = iter(range(10))

    def delete(state):
        if next(looks) == 3:
            cloud.write(cloud.state | {"jobset": None})
        return False

    cloud.interrupt_when = delete
    done = launch()
    assert done.code == 1 and "there is no JobSet m11 in namespace team" in done.err


def test_a_named_cluster_gets_its_credentials(cloud, launch):
    done = launch("--cluster", "tpus", "--zone", "us-central1", "--project", "proj")
    assert done.code == 0, done.err
    (words,) = cloud.calls("get-credentials")
    assert words[1:] == "container clusters get-credentials tpus --location us-central1 --project proj --quiet".split()


def test_an_unreachable_cluster_is_reported(cloud, launch):
    cloud.plan(faults=[{"match": "get-credentials", "err": "not found"}])
    done = launch("--cluster", "tpus", "--zone", "us-central1", "--project", "proj")
    assert done.code == 1 and "the cluster tpus cannot be reached: not found" in done.err


def test_secrets_are_only_in_a_secret_owned_by_the_jobset(cloud, launch):
    done = launch(variables={"HF_TOKEN": "hf_verysecret"})
    assert done.code == 0
    assert cloud.state["secret"]["stringData"]["HF_TOKEN"] == "hf_verysecret"
    assert cloud.state["secret"]["stringData"]["JAX_COORDINATOR_PORT"] == "8476"
    assert cloud.state["secret"]["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    assert "verysecret" not in done.out + done.err + cloud.everything_said() + str(cloud.state["jobset"])


def test_a_detached_launch_prints_how_to_follow_and_all_commands_work_by_name(cloud):
    cloud.plan(attempts=[{"pods": {"0": SPOKEN, "1": SPOKEN}, "end": "Completed"}])
    done = cloud.call(*CLUSTER, "--tpu_type", "v5p-16", "--image", "i", "--run_id", "m11", "--", "true")
    assert done.code == 0 and "finished" not in done.out
    named = (*CLUSTER, "--run_id", "m11")
    for word in ("logs --foreground", "status", "clean"):
        assert f"python infra/launch.py {word} --backend gke --run_id m11 --namespace team" in done.out
    assert "running, 0 restarts" in cloud.call("status", *named).out
    assert cloud.call("logs", *named).host_lines(0) == ["step 1", "step 2"]
    followed = cloud.call("logs", "--foreground", *named)
    assert followed.code == 0 and followed.last_line == cloud.finished
    assert cloud.call("clean", *named).code == 0
    assert cloud.state["jobset"] is None and cloud.state["secret"] is None
    assert "not found in namespace team" in cloud.call("status", *named).out


@pytest.mark.parametrize(("answer", "is_there"), [("y", False), ("n", True)])
def test_ctrl_c_asks_whether_to_delete_the_jobset(cloud, launch, answer, is_there):
    cloud.plan(attempts=[{"suspended": 99}])
    cloud.answers = [answer]
    cloud.interrupt_when = lambda state: state["secret"] is not None
    assert launch().code == 130
    assert (cloud.state["jobset"] is not None) == is_there


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tpu_type", "v3-32"], "GKE does not offer v3-32"),
        (["--tpu_type", "v5p-16", "--capacity_type", "best-effort"], "does not support capacity 'best-effort'"),
        (["--tpu_type", "v5p-16", "--namespace", "No"], "--namespace 'No'"),
    ],
)
def test_options_that_gke_lacks_are_refused(cloud, flags, message):
    done = cloud.call("--backend", "gke", *flags, "--image", "i", "--", "true")
    assert done.code == 2 and message in done.err
