"""What Ray says may be odd: items that cannot be read are left out, and the controller goes on."""

from __future__ import annotations

import http.server
import json
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import anyio
import pytest
from support.store import opened, submit
from support.waiting import wait_until

from raylaunch.controller.ray.jobs_api import RayJob, RayJobs
from raylaunch.controller.settings import Settings
from raylaunch.errors import ClusterDownError
from raylaunch.models.states import JobState

GOOD = {"type": "SUBMISSION", "submission_id": "good", "status": "RUNNING"}


@contextmanager
def ray_that_says(answer: bytes | Callable[[str], bytes]) -> Iterator[str]:
    """Serve what a dashboard of Ray would say: the same whatever it is asked, or by the path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answer(self.path) if callable(answer) else answer
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


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"3", b"null", b"[" * 200_000])
def test_a_version_that_is_no_version_is_a_ray_that_does_not_answer(body: bytes) -> None:
    async def ask(url: str) -> str:
        jobs = RayJobs(url, "token")
        try:
            return await jobs.version()
        finally:
            await jobs.close()

    with ray_that_says(body) as url, pytest.raises(ClusterDownError):
        anyio.run(ask, url)


def test_a_controller_whose_loop_fails_exits_with_status_1_and_the_next_one_repairs(
    tmp_path: Path,
) -> None:
    """Something takes the table of jobs away under a controller; then Ray shows a job that must be recorded."""
    with opened(tmp_path / "store") as records:
        job = submit(records)
    asked: list[str] = []
    jobs: list[object] = []

    def says(path: str) -> bytes:
        asked.append(path)
        return json.dumps({"ray_version": "2"} if path == "/api/version" else jobs).encode()

    with ray_that_says(says) as url, socket.create_server(("127.0.0.1", 0)) as free:
        (tmp_path / "token").write_text("none")
        settings = Settings(
            cluster="lab", cluster_id="lab", store=tmp_path / "store", port=free.getsockname()[1],
            gcs_address="127.0.0.1:9", dashboard_url=url, ray_token_path=tmp_path / "token",
        )  # fmt: skip
        free.close()
        (tmp_path / "controller.json").write_text(settings.model_dump_json())
        words = [sys.executable, "-m", "raylaunch.controller", "--config", str(tmp_path / "controller.json")]
        with (tmp_path / "log").open("wb") as log:
            controller = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(lambda: "/api/jobs/" in asked, 60, "the controller asks for Ray's jobs")
            with closing(sqlite3.connect(tmp_path / "store" / "raylaunch.db")) as database:
                database.execute("DROP TABLE jobs")
            jobs.append(GOOD)
            assert controller.wait(60) == 1
        finally:
            controller.kill()
            controller.wait(10)
    assert "the scheduler's loop failed" in (tmp_path / "log").read_text()
    with opened(tmp_path / "store") as records:
        assert records.by_id(job.id).state is JobState.QUEUED
        assert records.repairs
