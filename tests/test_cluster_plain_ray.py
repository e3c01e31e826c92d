"""Jobs of plain ``ray job submit``, shown, followed, read, stopped and removed with raylaunch, from every door."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import pytest
from support.agent import Agent, agent_at
from support.background import MB, Command, memory_of, started
from support.cluster import Cluster, argv
from support.plain_ray import listed_ids, plain_python, started_plain, status_in_ray, submit_plain
from support.tokens import people, person_of
from support.waiting import wait_until

import raylaunch
from raylaunch.errors import AccessError, ConflictError, JobFailedError
from raylaunch.models.states import JobState, Reason
from raylaunch.sdk.job import Job

pytestmark = pytest.mark.ray

LONG = 5_000_000
WILD = f"""\
import sys, time
out = sys.stdout.buffer
out.write(b'ready\\nnot utf-8: \\xff\\xfe end\\n' + b'x' * {LONG} + b'\\n')
out.flush()
time.sleep(1)
out.write(b'after the long line\\n')
"""
WAITS = "import time\nprint('ready', flush=True)\ntime.sleep(600)"


@pytest.fixture(scope="module")
def waiting(cluster: Cluster) -> Iterator[str]:
    """A job that runs until somebody stops it."""
    job = plain_python(cluster, "plain-waits", WAITS)
    started_plain(cluster, job)
    yield job
    if not cluster.job(job).state.ended:
        cluster.good("stop", job, "--wait")


QUICK = {
    "good": ["true"],
    "seven": ["sh", "-c", "echo before; echo boom >&2; exit 7"],
    "killed": ["sh", "-c", "exec sh -c 'kill -9 $$'"],
    "removed": ["true"],
    "gone": ["echo", "hi"],
}


@pytest.fixture(scope="module")
def quick(cluster: Cluster) -> dict[str, str]:
    """Jobs that end by themselves: each takes Ray some seconds, so that all begin together."""
    return {name: submit_plain(cluster, f"plain-{name}", words) for name, words in QUICK.items()}


def test_its_python_is_the_one_that_runs_ray(cluster: Cluster) -> None:
    job = plain_python(cluster, "plain-python", "import ray, sys; print(sys.executable)")
    assert cluster.ended(job).state is JobState.SUCCEEDED
    assert cluster.log(job).decode().splitlines()[-1] == sys.executable


# -- read ------------------------------------------------------------------------------------------------------------


def test_it_is_followed_past_a_byte_that_is_no_text_and_a_line_of_5_mb(cluster: Cluster) -> None:
    job = plain_python(cluster, "plain-wild", WILD)
    with started(cluster, "logs", job, "-f", "--offset", "0", "--raw") as follower:
        assert follower.wait(60) == 0, follower.err
        followed = follower.out
    assert followed.endswith(b"ready\nnot utf-8: \xff\xfe end\n" + b"x" * LONG + b"\nafter the long line\n")
    assert cluster.log(job) == followed
    assert cluster.good("logs", job, "-n", "1") == "after the long line\n"


def test_it_is_searched(cluster: Cluster, waiting: str) -> None:
    found = json.loads(cluster.good("logs", waiting, "--search", "READY", "-i", "--json"))
    assert [match["text"] for match in found["matches"]][-1] == "ready"
    assert cluster.log(waiting)[found["matches"][-1]["offset"] :].startswith(b"ready\n")
    assert cluster.cli("logs", waiting, "--search", "(", "--regex").status == 2


def test_a_line_is_followed_while_it_is_young(cluster: Cluster) -> None:
    code = "import time\nfor n in range(200):\n    print(time.time(), flush=True)\n    time.sleep(0.05)"
    job = plain_python(cluster, "plain-quick", code)
    cluster.runs(job)
    with started(cluster, "logs", job, "-f") as follower:
        wait_until(lambda: follower.out.count(b"\n") > 20, 30, "lines are followed")
        assert not cluster.job(job).state.ended


@pytest.mark.long
def test_a_log_that_ray_deleted_is_reported_as_deleted(cluster: Cluster, quick: dict[str, str]) -> None:
    job = quick["gone"]
    cluster.ended(job)
    for log in cluster.paths.temp.glob(f"session_*/logs/job-driver-{job}.log"):
        log.unlink()
    gone = cluster.cli("logs", job)
    assert gone.status == 1
    assert f"Ray no longer has the log of {job} on" in gone.err


@pytest.mark.parametrize("words", [("get",), ("files",), ("metrics",)])
def test_files_and_metrics_of_an_external_job_are_refused_with_a_hint(
    cluster: Cluster, waiting: str, words: tuple[str, ...]
) -> None:
    refused = cluster.cli(*words, waiting)
    assert refused.status == 1
    what = "metrics" if words == ("metrics",) else "files"
    assert f"{waiting} was submitted with plain ray job submit: raylaunch stores no {what} of it" in refused.err
    assert f"its log: raylaunch logs {waiting}" in refused.err


def test_it_has_one_log_and_one_attempt(cluster: Cluster, waiting: str) -> None:
    assert "has one log, that of rank 0" in cluster.cli("logs", waiting, "--rank", "1").err
    assert f"{waiting} has no attempt 2" in cluster.cli("logs", waiting, "--attempt", "2").err


@pytest.mark.long
def test_with_a_hanging_bridge_the_log_is_read_from_rays_api(cluster: Cluster, waiting: str) -> None:
    link = next(
        process
        for process in cluster.processes()
        if any("raylaunch.controller.ray.process" in word for word in argv(process))
    )
    link.send_signal(signal.SIGSTOP)
    try:
        assert cluster.good("logs", waiting, "-n", "1") == "ready\n"
    finally:
        link.send_signal(signal.SIGCONT)


# -- its end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), [("good", 0), ("seven", 7), ("killed", 128 + signal.SIGKILL)])
def test_waiting_for_it_exits_with_its_status(cluster: Cluster, quick: dict[str, str], name: str, status: int) -> None:
    assert cluster.cli("wait", quick[name]).status == status


def test_a_running_one_is_stopped_and_ray_agrees(cluster: Cluster) -> None:
    job = plain_python(cluster, "plain-stopped", WAITS)
    started_plain(cluster, job)
    process = next(one for one in psutil.process_iter() if "import time" in " ".join(argv(one)) and _is_of(one, job))
    assert cluster.good("stop", job).split() == [job, "stopping"]
    ended = cluster.ended(job)
    assert (ended.state, ended.reason) == (JobState.STOPPED, Reason.STOP_REQUESTED)
    assert ended.message.startswith("stop requested by")
    assert status_in_ray(cluster, job) == "STOPPED"
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 60, "its process is gone")
    assert cluster.cli("wait", job).status == 128 + signal.SIGTERM
    again = cluster.cli("stop", job)
    assert again.status == 1
    assert f"{job} has ended already: stopped" in again.err


def _is_of(process: psutil.Process, submission: str) -> bool:
    try:
        return submission in process.environ().get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    except psutil.Error:
        return False


def test_one_that_waits_for_gpus_is_stopped_at_once_and_never_starts(cluster: Cluster) -> None:
    job = submit_plain(cluster, "plain-queued", ["echo", "it began"], entrypoint_num_gpus=64)
    assert cluster.job(job).state is JobState.QUEUED
    cluster.good("stop", job, "--wait")
    ended = cluster.job(job)
    assert (ended.state, ended.attempts) == (JobState.STOPPED, ())
    assert ended.message.startswith("stop requested by")
    assert status_in_ray(cluster, job) == "FAILED"  # for Ray, whose waiting actor was killed
    assert cluster.cli("logs", job).out == ""


def test_one_that_has_ended_is_removed_from_ray_too(cluster: Cluster, quick: dict[str, str]) -> None:
    job = quick["removed"]
    cluster.ended(job)
    assert cluster.good("rm", job) == f"removed {job} (0 B)\n"
    assert job not in listed_ids(cluster)
    assert status_in_ray(cluster, job) == ""


def test_a_running_one_is_not_removed(cluster: Cluster, waiting: str) -> None:
    refused = cluster.cli("rm", waiting)
    assert refused.status == 1
    assert f"{waiting} is running; only a job that has ended can be removed" in refused.err


def test_an_external_job_has_no_owner_and_an_operator_stops_it(cluster: Cluster, waiting: str) -> None:
    with people(cluster, vera="viewer", tom="trainer"):
        with person_of(cluster, "vera") as vera:
            assert vera.job(waiting).logs(tail=1) == "ready\n"
            with pytest.raises(AccessError, match="vera is a viewer and may not stop jobs"):
                vera.job(waiting).stop()
        with (
            person_of(cluster, "tom") as tom,
            pytest.raises(AccessError, match=f"tom may not stop {waiting}, which was submitted with Ray's own tools"),
        ):
            tom.job(waiting).stop()
    assert cluster.job(waiting).state is JobState.RUNNING


# -- the other doors -------------------------------------------------------------------------------------------------


@contextmanager
def found_in_python(cluster: Cluster, job: str) -> Iterator[Job]:
    with raylaunch.connect(reach=cluster.reach()) as connected:
        yield connected.job(job)


def test_python_follows_reads_stops_and_waits_for_it(cluster: Cluster) -> None:
    with found_in_python(cluster, plain_python(cluster, "plain-python", WAITS)) as job:
        lines = job.follow_logs()
        assert any(line == "ready" for line in lines)
        assert job.logs(tail=1) == "ready\n"
        assert [match.text for match in job.search_logs("^ready$", regex=True).matches] == ["ready"]
        job.stop()
        assert job.wait(timeout_s=30).state is JobState.STOPPED
        assert [event.state for event in job.follow()][-1] is JobState.STOPPED
        with pytest.raises(ConflictError):
            job.stop()


def test_its_result_is_its_success_or_its_last_lines(cluster: Cluster, quick: dict[str, str]) -> None:
    with found_in_python(cluster, quick["good"]) as job:
        assert job.result(timeout_s=30) == ()
    with found_in_python(cluster, quick["seven"]) as job, pytest.raises(JobFailedError, match="boom") as caught:
        job.result(timeout_s=30)
    assert caught.value.exit_code == 7


@pytest.fixture(scope="module")
def agent(cluster: Cluster) -> Iterator[Agent]:
    with agent_at(cluster.home, cluster.work) as opened:
        yield opened


def test_an_agent_watches_reads_and_stops_it(cluster: Cluster, agent: Agent) -> None:
    job = plain_python(cluster, "plain-agent", WAITS)
    started_plain(cluster, job)
    seen = agent.call("monitor_job", job=job).facts
    assert (seen["job"]["state"], seen["job"]["foreign"], seen["log"]["lines"][-1]) == ("running", True, "ready")
    assert agent.call("job_logs", job=job, tail=1).facts["log"]["lines"] == ["ready"]
    assert agent.call("job_logs", job=job, search="ready").facts["matches"] >= 1
    refused = agent.call("download_model", job=job)
    assert refused.error
    assert "raylaunch stores no files of it" in refused.text
    assert agent.call("stop_job", job=job).facts["job"]["state"] == "stopping"
    facts = agent.call("monitor_job", job=job, wait_s=30).facts
    assert facts["job"]["state"] == "stopped"


# -- size ------------------------------------------------------------------------------------------------------------

LARGE_MB = int(os.environ.get("RAYLAUNCH_TEST_LOG_MB", "100"))
FLAT = 60 * MB
FLOOD = (
    "import sys\n"
    "for block in range(int(sys.argv[1])):\n"
    "    sys.stdout.write(''.join(f'{block:06} {n:05} {\"y\" * 86}\\n' for n in range(10000)))\n"
)


@pytest.mark.long
def test_following_a_huge_one_and_reading_its_end_leave_memory_flat(cluster: Cluster, waiting: str) -> None:
    with started(cluster, "logs", waiting, "-n", "1") as small:
        small.wait()
    memory = memory_of(cluster)
    job = submit_plain(cluster, "plain-huge", ["python", "-c", FLOOD, str(LARGE_MB)])

    def ended(command: Command) -> bool:
        memory.look()
        return command.ended()

    with started(cluster, "logs", job, "-f", "--offset", "0", "--raw") as follower:
        wait_until(partial(ended, follower), 240, "the log has been followed to its end")
        assert follower.out.count(b"\n") >= LARGE_MB * 10_000
    lines = [f"{LARGE_MB - 1:06} {n:05} {'y' * 86}\n" for n in range(9000, 10000)]
    with started(cluster, "logs", job, "--tail", "1000") as tail:
        wait_until(partial(ended, tail), 60, "the end of the log is shown")
        assert tail.out.decode() == "".join(lines)
    grown = {**memory.growth(), "following client": follower.peak_bytes - small.peak_bytes}
    assert not {name: size for name, size in grown.items() if size > FLAT}, grown
