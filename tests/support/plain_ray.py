"""Jobs of plain Ray: what ``ray job submit`` asks of the same endpoint, without the seconds that its start takes."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Sequence

import httpx2

from raylaunch.models.job import JobView
from support.cluster import Cluster
from support.waiting import wait_until


def jobs_endpoint(cluster: Cluster) -> httpx2.Client:
    """Return a client of Ray's own endpoint."""
    access = cluster.ask(lambda client: client.ray_access())
    headers = {"Authorization": f"Bearer {access.token}"}
    return httpx2.Client(base_url=access.dashboard_url, headers=headers, timeout=30, trust_env=False)


def submit_plain(cluster: Cluster, name: str, entrypoint: Sequence[str], **options: object) -> str:
    """Submit a job to Ray itself, and wait until raylaunch lists it; return its id, which begins with `name`."""
    submission = f"{name}-{secrets.token_hex(3)}"  # Ray takes an id once, and a test may run again
    body = {"submission_id": submission, "entrypoint": shlex.join(entrypoint), **options}
    with jobs_endpoint(cluster) as ray:
        ray.post("/api/jobs/", json=body).raise_for_status()
    wait_until(lambda: submission in listed_ids(cluster), 30, f"raylaunch lists {submission}")
    return submission


def listed_ids(cluster: Cluster) -> list[str]:
    """Return the ids that raylaunch lists."""
    return [job.id for job in cluster.ask(lambda client: client.jobs(limit=500)).jobs]


def status_in_ray(cluster: Cluster, submission: str) -> str:
    """Return what Ray says of a job; empty when it does not know it."""
    with jobs_endpoint(cluster) as ray:
        answer = ray.get(f"/api/jobs/{submission}")
    return str(answer.json()["status"]) if answer.is_success else ""


def plain_python(cluster: Cluster, name: str, code: str, **options: object) -> str:
    """Submit a line of Python to Ray itself; return its id."""
    return submit_plain(cluster, name, ["python", "-c", code], **options)


def started_plain(cluster: Cluster, submission: str, word: bytes = b"ready") -> JobView:
    """Wait until a job of plain Ray has written a word, and return it."""
    cluster.runs(submission)
    wait_until(lambda: word in cluster.log(submission), 30, f"{submission} has written {word!r}")
    return cluster.job(submission)
