"""Ray's own tools on a raylaunch cluster, and Ray's jobs in raylaunch's list: two doors to the same jobs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import httpx2
import pytest
from support.cluster import Cluster
from support.waiting import wait_until

from raylaunch.reasons import Reason
from raylaunch.state import JobState, JobView

pytestmark = pytest.mark.ray

STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = 'import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'\n"
    "subprocess.Popen([sys.executable, '-c', child], start_new_session=True)\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)"
)


def listed(cluster: Cluster, job: str) -> JobView:
    return cluster.until(job, lambda view: view.state.ended, 30, "raylaunch sees its end")


def ids(cluster: Cluster) -> list[str]:
    return [job.id for job in cluster.ask(lambda client: client.jobs()).jobs]


def line_of(table: str, job: str) -> str:
    return next(line for line in table.splitlines() if job in line)


def test_rays_own_tools_show_a_job_its_log_and_the_cluster(cluster: Cluster) -> None:
    job = cluster.python("print('seen through the other door')")
    cluster.ended(job)
    jobs = cluster.ray("job", "list")
    assert jobs.status == 0, jobs.err
    assert f"submission_id='{job}-1'" in jobs.out
    logs = cluster.ray("job", "logs", f"{job}-1")
    assert logs.status == 0, logs.err
    assert "seen through the other door" in logs.out
    status = cluster.ray("status")
    assert status.status == 0, status.err
    assert "4.0 GPU" in status.out


def test_a_job_of_plain_ray_is_listed_marked_and_shown(cluster: Cluster) -> None:
    submitted = cluster.ray("job", "submit", "--no-wait", "--submission-id", "plain-one", "--", "echo", "hi")
    assert submitted.status == 0, submitted.err
    wait_until(lambda: "plain-one" in ids(cluster), 30, "raylaunch lists it")
    job = listed(cluster, "plain-one")
    assert (job.state, job.foreign, job.entrypoint) == (JobState.SUCCEEDED, True, "echo hi")
    assert line_of(cluster.good("list"), "plain-one").split()[:4] == ["plain-one", "(ray", "job)", "succeeded"]
    shown = cluster.good("show", "plain-one").splitlines()
    assert shown[0].split(maxsplit=1) == ["job", "plain-one (submitted with plain ray job submit)"]
    assert shown[1].split() == ["state", "succeeded"]


def test_a_job_of_plain_ray_that_fails_has_failed_with_rays_words(cluster: Cluster) -> None:
    cluster.ray("job", "submit", "--no-wait", "--submission-id", "plain-two", "--", "bash", "-c", "exit 3")
    wait_until(lambda: "plain-two" in ids(cluster), 30, "raylaunch lists it")
    job = listed(cluster, "plain-two")
    assert job.state is JobState.FAILED
    assert "exit code 3" in job.message


def test_a_job_of_plain_ray_is_stopped_and_read_with_rays_tools_and_raylaunch_says_how(cluster: Cluster) -> None:
    cluster.ray("job", "submit", "--no-wait", "--submission-id", "plain-three", "--", "sleep", "600")
    wait_until(lambda: "plain-three" in ids(cluster), 30, "raylaunch lists it")
    refused = cluster.cli("stop", "plain-three")
    assert refused.status == 1
    assert "plain-three was submitted with plain ray job submit" in refused.err
    assert 'eval "$(raylaunch env)"; ray job stop plain-three' in refused.err
    unread = cluster.cli("logs", "plain-three")
    assert unread.status == 1
    assert 'eval "$(raylaunch env)"; ray job logs plain-three' in unread.err
    stopped = cluster.ray("job", "stop", "plain-three")
    assert stopped.status == 0, stopped.err
    assert listed(cluster, "plain-three").state is JobState.STOPPED


def test_ray_job_stop_ends_a_job_of_ours_with_nothing_left_and_says_who_stopped_it(cluster: Cluster) -> None:
    job = cluster.python(STUBBORN, "--grace", "1s")
    cluster.runs(job)
    wait_until(lambda: b"ready" in cluster.log(job), 20, "the training has started its child")
    assert len(cluster.of_attempt(f"{job}-1")) >= 2
    result = cluster.ray("job", "stop", f"{job}-1")
    assert result.status == 0, result.err
    stopped = cluster.ended(job)
    assert (stopped.state, stopped.reason) == (JobState.STOPPED, Reason.STOPPED_BY_RAY)
    assert stopped.message == "stopped with Ray's own tools"
    assert not cluster.of_attempt(f"{job}-1")


@contextmanager
def people(cluster: Cluster, **roles: str) -> Iterator[None]:
    """Give people tokens, each the name itself, beside those there are."""
    path = Path(cluster.record().store) / "tokens.json"
    before = path.read_text()
    book = cast("dict[str, list[dict[str, str]]]", json.loads(before))
    book["tokens"] += [
        {"sha256": hashlib.sha256(name.encode()).hexdigest(), "person": name, "role": role}
        for name, role in roles.items()
    ]
    path.write_text(json.dumps(book))
    try:
        yield
    finally:
        path.write_text(before)


def test_rays_own_access_takes_an_operator(cluster: Cluster) -> None:
    url = f"{cluster.reach().url}/v1/ray"
    with people(cluster, vera="viewer", tom="trainer", olga="operator"):
        answers = {
            name: httpx2.get(url, headers={"Authorization": f"Bearer {name}"}, trust_env=False)
            for name in ("vera", "tom", "olga", "nobody")
        }
    assert {name: answer.status_code for name, answer in answers.items()} == {
        "vera": 403,
        "tom": 403,
        "olga": 200,
        "nobody": 401,
    }
    assert answers["tom"].json()["error"]["message"] == "tom is a trainer and may not use Ray's own tools"
    assert answers["olga"].json()["dashboard_url"] == cluster.ray_env()["RAY_API_SERVER_ADDRESS"]
