"""What Ray says may be odd: items that cannot be read are left out, and the controller goes on."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest

from raylaunch.controller.ray_jobs import RayJob, RayJobs
from raylaunch.errors import ClusterDownError

GOOD = {"type": "SUBMISSION", "submission_id": "good", "status": "RUNNING"}


@contextmanager
def ray_that_says(body: bytes) -> Iterator[str]:
    """Serve what a dashboard of Ray would say, whatever it is asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def all_of(body: bytes) -> list[RayJob]:
    async def ask(url: str) -> list[RayJob]:
        jobs = RayJobs(url, "token")
        try:
            return await jobs.all()
        finally:
            await jobs.close()

    with ray_that_says(body) as url:
        return anyio.run(ask, url)


@pytest.mark.parametrize(
    "odd",
    [
        3,
        None,
        {},
        {**GOOD, "submission_id": "odd", "status": None},
        {**GOOD, "submission_id": "odd", "start_time": -1},
        {**GOOD, "submission_id": "odd", "start_time": 10**30},
        {**GOOD, "submission_id": "odd", "end_time": "yesterday"},
        {**GOOD, "submission_id": "odd", "metadata": [1]},
        {**GOOD, "submission_id": "\ud800"},
        {**GOOD, "submission_id": "odd", "driver_exit_code": 2**70},
    ],
)
def test_one_odd_job_hides_no_other(odd: object) -> None:
    assert [job.submission_id for job in all_of(json.dumps([odd, GOOD]).encode())] == ["good"]


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"jobs": []}', b"null", b"[" * 200_000])
def test_what_is_no_list_of_jobs_is_a_ray_that_does_not_answer(body: bytes) -> None:
    with pytest.raises(ClusterDownError):
        all_of(body)


def test_a_version_that_is_no_version_is_a_ray_that_does_not_answer() -> None:
    async def ask(url: str) -> str:
        jobs = RayJobs(url, "token")
        try:
            return await jobs.version()
        finally:
            await jobs.close()

    with ray_that_says(b"<html>") as url, pytest.raises(ClusterDownError):
        anyio.run(ask, url)
