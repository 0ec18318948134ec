"""The end of a launch on a TPU VM and what remains: --autodelete, stop, Ctrl-C and signals."""

import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

INFRA = pathlib.Path(__file__).resolve().parents[2] / "infra"
FAILS = {"code": 3, "lines": ["step 1", "ValueError: no"]}
SILENT = ("docker logs --follow", "inspect --format")
HANGS = {"hangs": True, "lines": ["waiting"]}


class TestAutodelete:
    @pytest.fixture(autouse=True)
    def has_tpu(self, cloud):
        cloud.has_tpu(kind="v5p-8")

    @pytest.mark.parametrize(
        ("plan", "code"),
        [
            ({}, 0),
            ({"containers": [{"all": FAILS}]}, 3),
            ({"faults": [{"match": "docker pull", "at": "docker 0", "err": "denied"}]}, 1),
            ({"faults": [{"match": "docker run", "at": "docker 0", "code": 125, "err": "no space left"}]}, 1),
        ],
    )
    def test_the_tpu_is_deleted_when_the_job_has_ended_or_could_not_start(self, cloud, plan, code):
        cloud.plan(**plan)
        assert cloud.launch_on_one_host("--autodelete").code == code
        assert cloud.state["deleted"] == 1 and cloud.state["node"] is None

    def test_one_that_never_became_ready_is_deleted_too(self, cloud):
        cloud.write(cloud.state | {"node": None, "request": None, "made": 0})
        cloud.plan(lives=[[["PROVISIONING", "CREATING"]]])
        done = cloud.launch_on_one_host("--autodelete", "--start_timeout", "5", "--retries", "0")
        assert done.code == 1 and cloud.state["request"] is None

    def test_it_is_kept_where_a_job_may_be_running(self, cloud):
        cloud.put_container(0, "theirs", state="running")
        assert cloud.launch_on_one_host("--autodelete").code == 1
        cloud.put_container(0, "theirs", state="exited")
        silence = [{"match": words, "at": "host 0", "kind": "refuse", "times": 99} for words in SILENT]
        cloud.plan(containers=[{"all": HANGS}], faults=silence)
        done = cloud.launch_on_one_host("--autodelete")
        assert done.code == 1 and "clean --tpu_name m11" in done.err
        assert cloud.state["deleted"] == 0

    def test_a_failure_is_reported_even_if_the_tpu_cannot_be_deleted(self, cloud):
        cloud.plan(containers=[{"all": FAILS}], faults=[{"match": "queued-resources delete", "err": "503", "times": 9}])
        done = cloud.launch_on_one_host("--autodelete")
        assert done.code == 3 and "could not be deleted" in done.err and "ValueError: no" in done.err


class TestStop:
    def test_a_container_that_cannot_be_stopped_is_reported(self, cloud):
        cloud.has_tpu(kind="v5p-8")
        cloud.plan(
            containers=[{"all": HANGS}], faults=[{"match": "docker stop", "at": "docker 0", "err": "it is stuck"}]
        )
        cloud.call(*cloud.where, "--tpu_type", "v5p-8", "--image", "i", "--", "true")
        done = cloud.call("stop", *cloud.where)
        assert done.code == 1 and "it is stuck" in done.err and "is stopped" not in done.out

    @pytest.mark.parametrize("word", ["stop", "status", "logs"])
    def test_a_host_that_cannot_be_queried_is_reported(self, cloud, word):
        cloud.has_tpu(kind="v5p-8")
        cloud.plan(faults=[{"match": "current", "at": "host 0", "kind": "refuse", "times": 9}])
        done = cloud.call(word, *cloud.where)
        assert done.code == 1 and "host 0 of TPU m11 could not be queried" in done.err


class TestCtrlC:
    @pytest.mark.parametrize(("answer", "state"), [("y", "exited"), ("n", "running"), (None, "running")])
    def test_it_asks_whether_to_stop_the_job_too(self, cloud, answer, state):
        cloud.has_tpu(kind="v5p-8")
        cloud.plan(containers=[{"all": HANGS}])
        cloud.answers = [answer]
        cloud.interrupt_when = lambda state: bool(state["started"])
        done = cloud.launch_on_one_host()
        assert done.code == 130
        assert cloud.questions == [f"Stop the job {cloud.run_id} on all hosts too? [y/N] "]
        assert cloud.containers(0)[f"simpo-{cloud.run_id}"]["state"] == state
        assert ("logs --foreground" in done.out) == (state == "running")

    def test_a_second_ctrl_c_leaves_the_job_alone(self, cloud):
        cloud.has_tpu(kind="v5p-8")
        cloud.plan(containers=[{"all": HANGS}])
        cloud.answers = [KeyboardInterrupt]
        cloud.interrupt_when = lambda state: bool(state["started"])
        assert cloud.launch_on_one_host().code == 130
        assert cloud.containers(0)[f"simpo-{cloud.run_id}"]["state"] == "running"

    @pytest.mark.parametrize(("answer", "is_there"), [("yes", False), ("", True)])
    def test_while_hosts_are_prepared_it_asks_whether_to_delete_the_tpu(self, cloud, answer, is_there):
        cloud.has_tpu(kind="v5p-8")
        cloud.plan(faults=[{"match": "told", "at": "host 0", "kind": "refuse", "times": 9}])
        cloud.answers = [answer]
        cloud.interrupt_when = lambda state: any("ssh" in call["words"] for call in state["calls"])
        done = cloud.launch_on_one_host()
        assert done.code == 130 and cloud.questions == ["Delete TPU m11 too? [y/N] "]
        assert (cloud.state["node"] is not None) == is_there and ("remains and is billed" in done.out) == is_there

    @pytest.mark.parametrize(("answer", "is_there"), [("yes", False), ("", True)])
    def test_in_the_queue_it_asks_whether_to_delete_the_request(self, cloud, answer, is_there):
        cloud.plan(lives=[[["WAITING_FOR_RESOURCES", None]]])
        cloud.answers = [answer]
        cloud.interrupt_when = lambda state: state["request"] == {"state": "WAITING_FOR_RESOURCES"}
        assert cloud.launch_on_one_host().code == 130
        assert (cloud.state["request"] is not None) == is_there


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_program_exits_on_a_signal_and_leaves_the_job_alone_without_a_terminal(cloud, tmp_path, number):
    # A copy, so that the logs of hosts are written beside it.
    shutil.copytree(INFRA, tmp_path / "infra", ignore=shutil.ignore_patterns("__pycache__"))
    cloud.has_tpu(kind="v5p-8")
    cloud.plan(containers=[{"all": HANGS}])
    words = ["--foreground", *cloud.where, "--tpu_type", "v5p-8", "--image", "i", "--run_id", "mine", "--", "true"]
    program = [sys.executable, str(tmp_path / "infra" / "launch.py"), *words]
    with subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        # Each line is printed before the next one arrives.
        assert any("[host 0] waiting" in line for line in launcher.stdout)
        launcher.send_signal(number)
        rest = launcher.stdout.read()
    assert launcher.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert cloud.finished not in rest
    assert cloud.containers(0)["simpo-mine"]["state"] == "running"
