"""Who follows a job may leave at any moment: the job goes on."""

from __future__ import annotations

import signal

import pytest
from support.background import Command, started
from support.cluster import Cluster
from support.waiting import wait_until

from raylaunch.models.states import JobState

pytestmark = pytest.mark.ray

WAITS_FOR_A_FILE = (
    "import os, sys, time\n"
    "print('ready', flush=True)\n"
    "while not os.path.exists(sys.argv[1]):\n"
    "    time.sleep(0.05)\n"
    "print('done', flush=True)\n"
)


def run_words(cluster: Cluster, name: str) -> tuple[str, ...]:
    sign = str(cluster.work / f"{name}.go")
    return ("run", "--working-dir", "", "--name", name, "--", "python", "-c", WAITS_FOR_A_FILE, sign)


def let_go(cluster: Cluster, name: str) -> None:
    (cluster.work / f"{name}.go").touch()


def shows(command: Command, text: bytes) -> None:
    wait_until(lambda: text in command.out or command.ended(), 60, f"it shows {text!r}")
    assert command.status is None, command.err


def test_control_c_while_following_detaches_and_the_job_continues(cluster: Cluster) -> None:
    with started(cluster, *run_words(cluster, "left-alone")) as run:
        shows(run, b"ready\n")
        run.signal(signal.SIGINT)
        status = run.wait(20)
        output = run.err.splitlines()
    job = cluster.job("left-alone")
    assert status == 0
    assert output[-1] == f"Detached; the job keeps running. Follow it again: raylaunch follow {job.id}"
    assert job.state is JobState.RUNNING
    let_go(cluster, "left-alone")
    followed = cluster.cli("follow", job.id)
    assert (followed.status, followed.out.splitlines()) == (0, ["ready", "done"])


def test_a_killed_client_leaves_its_job_running(cluster: Cluster) -> None:
    with started(cluster, *run_words(cluster, "orphaned")) as run:
        shows(run, b"ready\n")
        run.signal(signal.SIGKILL)
        run.wait(20)
    assert cluster.job("orphaned").state is JobState.RUNNING
    let_go(cluster, "orphaned")
    assert cluster.ended("orphaned").state is JobState.SUCCEEDED
    assert cluster.log("orphaned") == b"ready\ndone\n"
