"""Ray's own tools on a raylaunch cluster, and Ray's jobs in raylaunch's list: two doors to the same jobs."""

from __future__ import annotations

import httpx2
import pytest
from support.cluster import Cluster
from support.plain_ray import listed_ids
from support.tokens import people
from support.waiting import wait_until

from raylaunch.models.job import JobView
from raylaunch.models.states import JobState, Reason

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


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("nodes", "ALIVE"),
        pytest.param("actors", "NodeAgent", marks=pytest.mark.long),
        pytest.param("jobs", "SUBMISSION", marks=pytest.mark.long),
    ],
)
def test_rays_state_tools_work_in_that_environment(cluster: Cluster, what: str, shown: str) -> None:
    cluster.ended(cluster.python("print(1)"))
    found = cluster.ray("list", what)
    assert found.status == 0, found.err
    assert shown in found.out


def test_a_browser_gets_in_with_the_token_and_not_without(cluster: Cluster) -> None:
    env = cluster.ray_env()
    token = {"Authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"}
    with httpx2.Client(base_url=env["RAY_API_SERVER_ADDRESS"], trust_env=False, timeout=20) as browser:
        page = browser.get("/")
        assert (page.status_code, "<title>Ray Dashboard</title>" in page.text) == (200, True)
        assert browser.get("/api/version").status_code == 401
        assert browser.post("/api/authenticate", headers=token).status_code == 200  # what the page's dialog asks
        assert browser.get("/api/version").status_code == 200  # with the cookie that it got


def test_a_job_of_plain_ray_is_listed_marked_and_shown(cluster: Cluster) -> None:
    submitted = cluster.ray("job", "submit", "--no-wait", "--submission-id", "plain-one", "--", "echo", "hi")
    assert submitted.status == 0, submitted.err
    wait_until(lambda: "plain-one" in listed_ids(cluster), 30, "raylaunch lists it")
    job = listed(cluster, "plain-one")
    assert (job.state, job.foreign, job.entrypoint) == (JobState.SUCCEEDED, True, "echo hi")
    assert line_of(cluster.good("list"), "plain-one").split()[:4] == ["plain-one", "(ray", "job)", "succeeded"]
    shown = cluster.good("show", "plain-one").splitlines()
    assert shown[0].split(maxsplit=1) == ["job", "plain-one (submitted with plain ray job submit)"]
    assert shown[1].split() == ["state", "succeeded"]


def test_an_external_job_that_fails_shows_rays_message(cluster: Cluster) -> None:
    cluster.ray("job", "submit", "--no-wait", "--submission-id", "plain-two", "--", "bash", "-c", "exit 3")
    wait_until(lambda: "plain-two" in listed_ids(cluster), 30, "raylaunch lists it")
    job = listed(cluster, "plain-two")
    assert job.state is JobState.FAILED
    assert "exit code 3" in job.message


def test_ray_job_stop_stops_a_raylaunch_job_completely_and_the_job_shows_who_did_it(cluster: Cluster) -> None:
    job = cluster.python(STUBBORN, "--grace", "1s")
    cluster.ready(job)
    assert len(cluster.of_attempt(f"{job}-1")) >= 2
    result = cluster.ray("job", "stop", f"{job}-1")
    assert result.status == 0, result.err
    stopped = cluster.ended(job)
    assert (stopped.state, stopped.reason) == (JobState.STOPPED, Reason.STOPPED_BY_RAY)
    assert stopped.message == "stopped with Ray's own tools"
    assert not cluster.of_attempt(f"{job}-1")


def test_rays_own_access_requires_an_operator(cluster: Cluster) -> None:
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
