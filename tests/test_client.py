"""The client against the real API on a real port."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.api import Api
from support.client_use import ask, ended, submitted

from raylaunch.client.client import Client
from raylaunch.client.packing import CHUNK, pack
from raylaunch.client.submission import with_wandb
from raylaunch.cluster.types import Endpoint
from raylaunch.errors import (
    AccessError,
    ClusterDownError,
    ConflictError,
    NotFoundError,
    RaylaunchError,
    SpecError,
    VersionError,
)
from raylaunch.models.job import DryRun, JobView, SubmitAnswer
from raylaunch.models.job_spec import JobSpec, Tracking
from raylaunch.models.states import Change, JobState
from raylaunch.version import API, __version__


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text("print(1)\n")
    return folder


@contextmanager
def stranger(headers: dict[str, str], *, status: int = 200, body: object = None) -> Iterator[str]:
    """Serve something that is not our controller, or one of another version."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode() if body else b"")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def status_error(url: str) -> RaylaunchError:
    async def run() -> None:
        async with Client(Endpoint(url, "x")) as client:
            await client.status()

    with pytest.raises(RaylaunchError) as caught:
        asyncio.run(run())
    return caught.value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_cluster_that_does_not_listen_is_down() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    error = status_error(url)
    assert isinstance(error, ClusterDownError)
    assert str(error) == (
        f"cluster 'local' does not answer at {url}\n"
        "  → raylaunch up starts what is missing; raylaunch status shows what is running"
    )


def test_another_server_on_the_port_is_not_mistaken_for_the_controller() -> None:
    with stranger({}) as url:
        assert status_error(url).message == f"the server at {url} is not the controller of a raylaunch cluster"


@pytest.mark.parametrize(("version", "reported"), [("0.1.0", True), (__version__, False), ("99.0.0", False)])
def test_features_an_older_controller_lacks_are_refused_with_a_hint(version: str, *, reported: bool) -> None:
    headers = {"X-Raylaunch-Api": str(API), "X-Raylaunch-Version": version}
    body = {"error": {"code": "not_found", "message": "there is no /v1/status here", "hint": "see openapi.json"}}
    with stranger(headers, status=404, body=body) as url:
        error = status_error(url)
    assert isinstance(error, NotFoundError)
    assert "openapi.json" in error.hint
    assert ("raylaunch up" in error.hint) == reported


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        ("0", "raylaunch up starts a controller of this version; running jobs continue"),
        ("99", "install the controller's version here: pip install raylaunch==9.9"),
    ],
)
def test_a_controller_with_another_protocol_is_refused_with_a_hint(number: str, hint: str) -> None:
    with stranger({"X-Raylaunch-Api": number, "X-Raylaunch-Version": "9.9"}) as url:
        error = status_error(url)
    assert isinstance(error, VersionError)
    assert error.hint == hint
    assert f"their protocols differ (1 here, {number} there)" in error.message


def test_an_unknown_token_is_an_access_error(api: Api) -> None:
    with pytest.raises(AccessError):
        ask(api, lambda client: client.status(), person="mallory")


def test_the_status_shows_the_caller(api: Api) -> None:
    status = ask(api, lambda client: client.status())
    assert (status.person, status.role) == ("tom", "trainer")


def test_a_declined_upload_sends_nothing_and_present_code_needs_no_confirmation(api: Api, code: Path) -> None:
    asked: list[int] = []

    async def refuse(size: int) -> None:
        asked.append(size)
        msg = "no"
        raise ConflictError(msg)

    async def submit(client: Client) -> None:
        spec = JobSpec(entrypoint="python train.py", working_dir=str(code))
        with pytest.raises(ConflictError, match="no"):
            await client.submit(spec, on_upload=refuse)
        assert not [file for file in (api.store / "packages").rglob("*") if file.is_file()]
        await client.submit(spec)
        await client.submit(spec, on_upload=refuse)

    ask(api, submit)
    assert len(asked) == 1


def test_a_submission_sends_code_report_and_git_facts(api: Api, code: Path) -> None:
    messages: list[tuple[int, int]] = []

    async def submit(client: Client) -> JobView:
        spec = JobSpec(entrypoint="python train.py", working_dir=str(code))
        answer = await client.submit(spec, on_packed=lambda report, size: messages.append((report.files, size)))
        return await client.job(answer.job.id)

    job = ask(api, submit)
    with pack(code) as packed:
        assert (api.store / "packages" / f"{packed.sha256}.tar.gz").read_bytes() == packed.file.read()
        assert messages == [(1, packed.bytes)]
    assert job.pack is not None
    assert job.pack.files == 1


def test_code_that_the_cluster_has_is_not_sent_again(api: Api, code: Path) -> None:
    sent: list[str] = []

    async def submit(client: Client) -> None:
        spec = JobSpec(entrypoint="x", working_dir=str(code))
        await client.submit(spec)
        await client.submit(spec, on_progress=lambda what, _done, _total: sent.append(what))

    ask(api, submit)
    assert sent == []


def test_an_interrupted_upload_is_resumed(api: Api, code: Path) -> None:
    seed = hashlib.sha256(b"seed").digest()
    noise = b"".join(hashlib.sha256(seed + n.to_bytes(4, "big")).digest() for n in range((CHUNK + CHUNK // 2) // 32))
    (code / "noise.bin").write_bytes(noise)
    progress: list[int] = []
    with pack(code) as packed, api.client() as http_client:
        first = packed.file.read(CHUNK // 4)
        answer = http_client.put(
            f"/v1/packages/{packed.sha256}", params={"offset": 0, "total": packed.bytes}, content=first
        )
        assert answer.json() == {"have": CHUNK // 4, "complete": False}
        spec = JobSpec(entrypoint="x", working_dir=str(code))
        ask(api, lambda client: client.submit(spec, on_progress=lambda _what, done, _total: progress.append(done)))
        assert progress[0] == CHUNK // 4
        assert progress[-1] == packed.bytes


def test_the_same_request_id_returns_the_same_job_and_refuses_another_spec(api: Api) -> None:
    async def thrice(client: Client) -> None:
        spec = JobSpec(entrypoint="x", working_dir="")
        first = await client.submit(spec, request_id="night")
        again = await client.submit(spec, request_id="night")
        assert (first.created, again.created, first.job.id) == (True, False, again.job.id)
        assert (await client.submit(spec)).job.id != (await client.submit(spec)).job.id
        await client.submit(JobSpec(entrypoint="y", working_dir=""), request_id="night")

    with pytest.raises(ConflictError):
        ask(api, thrice)


def test_a_dry_run_creates_no_job(api: Api) -> None:
    found = ask(api, lambda client: client.dry_run(JobSpec(entrypoint="python -m train")))
    assert found.message == "train would start on here at once"
    assert ask(api, lambda client: client.jobs()).total == 0


@contextmanager
def older_head(taken: list[dict[str, Any]]) -> Iterator[Endpoint]:
    """Serve what a controller of 0.1.0 does with a submission: its own fields are all that it takes."""
    job = JobView(id="x-1", name="x", owner="tom", state=JobState.QUEUED, created_at=1.0, updated_at=1.0)
    missing = {"error": {"code": "not_found", "message": "Not Found", "hint": ""}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(404, json.dumps(missing))

        def do_POST(self) -> None:
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            dry = DryRun(fits=("here",), message="would start").model_dump_json(exclude={"chosen", "pack"})
            self.answer(200, dry if "dry_run" in self.path else SubmitAnswer(job=job, created=True).model_dump_json())

        def answer(self, status: int, body: str) -> None:
            self.send_response(status)
            for name, value in {"X-Raylaunch-Api": "1", "X-Raylaunch-Version": "0.1.0"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_address[1]}", "x")
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_head_of_0_1_0_accepts_known_fields_and_the_rest_is_refused() -> None:
    taken: list[dict[str, Any]] = []
    notices: list[str] = []
    plain = JobSpec(entrypoint="x", working_dir="", env={"SEED": "1"})

    async def work(reach: Endpoint) -> None:
        async with Client(reach, patience_s=5, on_notice=notices.append) as client:
            assert (await client.submit(plain)).job.id == "x-1"
            found = await client.dry_run(plain)
            assert (found.message, found.chosen) == ("would start", None)
            with pytest.raises(VersionError, match="packages") as raised:
                await client.submit(plain.model_copy(update={"packages": ("numpy",)}))
            assert "raylaunch up" in raised.value.hint

    with older_head(taken) as reach:
        asyncio.run(work(reach))
    assert [sorted(one) for one in taken] == [["request_id", "spec"], ["spec"]]
    assert taken[0]["spec"] == {"entrypoint": "x", "working_dir": "", "env": {"SEED": "1"}, "environment": {}}
    assert all("0.1.0" in notice and "raylaunch up" in notice for notice in notices)
    assert notices


def test_jobs_are_filtered_and_paged(api: Api) -> None:
    ids = [submitted(api).id for _ in range(3)]

    async def both_pages(client: Client) -> list[str]:
        first = await client.jobs(limit=2, name="digits", states=[JobState.QUEUED])
        second = await client.jobs(limit=2, name="digits", states=[JobState.QUEUED], cursor=first.next_cursor)
        return [job.id for job in (*first.jobs, *second.jobs)]

    assert ask(api, both_pages) == ids[::-1]
    assert ask(api, lambda client: client.jobs(name="other")).jobs == ()


def test_an_unknown_job_is_not_found_by_the_error_of_the_controller(api: Api) -> None:
    submitted(api)
    with pytest.raises(NotFoundError, match="'digitz'"):
        ask(api, lambda client: client.job("digitz"))


def test_a_reference_with_odd_characters_stays_one_reference(api: Api) -> None:
    with pytest.raises(NotFoundError):
        ask(api, lambda client: client.job("../secrets?x=1"))


def test_stop_returns_the_job_and_a_second_stop_is_a_conflict_or_the_same(api: Api) -> None:
    job = submitted(api)
    assert ask(api, lambda client: client.stop(job.id, grace_s=3)).state is JobState.STOPPED
    assert ask(api, lambda client: client.wait(job.id)).message == "tom asked to stop it, grace 3.0"


def test_secrets_are_set_listed_and_removed_by_an_operator(api: Api) -> None:
    async def all_of_it(client: Client) -> list[tuple[str, ...]]:
        await client.secrets_set("HF_TOKEN", "hunter2")
        with_it = await client.secrets_list()
        await client.secrets_remove("HF_TOKEN")
        return [with_it, await client.secrets_list()]

    assert ask(api, all_of_it, person="olga") == [("HF_TOKEN",), ()]


def test_the_way_to_ray_is_an_operators(api: Api) -> None:
    assert ask(api, lambda client: client.ray_access(), person="olga").gcs_address == "127.0.0.1:1"
    with pytest.raises(AccessError):
        ask(api, lambda client: client.ray_access(), person="tom")


def test_an_ended_job_is_removed_and_one_that_runs_is_not(api: Api) -> None:
    job = submitted(api)
    with pytest.raises(ConflictError):
        ask(api, lambda client: client.remove(job.id))
    ended(api, job.id, Change.END_STOPPED)
    assert ask(api, lambda client: client.remove(job.id)) > 0


def test_usage_and_metrics_of_a_job_without_any_are_empty(api: Api) -> None:
    job = submitted(api)
    assert ask(api, lambda client: client.usage()).jobs[0].job == job.id
    assert ask(api, lambda client: client.metrics(job.id)).keys == ()

    async def csv(client: Client) -> bytes:
        return b"".join([data async for data in client.metrics_csv(job.id)])

    assert ask(api, csv) == b"step,at,key,value\n"


KEY = {"WANDB_API_KEY": "k" * 40}


def test_the_wandb_key_of_the_environment_is_sent_with_its_server() -> None:
    found = with_wandb(JobSpec(entrypoint="x"), {**KEY, "WANDB_BASE_URL": "http://wandb.example"})
    assert found.secrets == KEY
    assert found.spec.env == {"WANDB_BASE_URL": "http://wandb.example"}
    assert found.taken == ("WANDB_BASE_URL=http://wandb.example",)


def test_the_shells_wandb_variables_count_as_for_a_script_started_there() -> None:
    shell = {
        "WANDB_MODE": "online",
        "WANDB_PROJECT": "digits",
        "WANDB_ENTITY": "team",
        "WANDB_NAME": "first",
        "WANDB_NOTES": "try",
        "WANDB_TAGS": "a, b,",
        "WANDB_RUN_GROUP": "sweep",
        "WANDB_JOB_TYPE": "eval",
    }
    spec, secrets, taken = with_wandb(JobSpec(entrypoint="x"), {**shell, "WANDB_BASE_URL": "http://x", "PATH": "/bin"})
    assert spec.tracking == Tracking(mode="online", project="digits", entity="team", group="sweep", job_type="eval")
    assert (spec.tags, secrets) == (("a", "b"), {})
    assert spec.env == {"WANDB_NAME": "first", "WANDB_NOTES": "try"}
    assert set(taken) == {f"{name}={value}" for name, value in shell.items()}


@pytest.mark.parametrize(
    ("shell", "mode"),
    [
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_MODE": ""}, "auto"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
    ],
)
def test_the_shells_mode_is_the_jobs(shell: dict[str, str], mode: str) -> None:
    found = with_wandb(JobSpec(entrypoint="x"), {**KEY, **shell})
    assert found.spec.tracking.mode == mode
    assert bool(found.secrets) == (mode in {"auto", "online"})


def test_the_jobs_own_settings_take_precedence_over_the_shell() -> None:
    spec = JobSpec(
        entrypoint="x", tracking=Tracking(mode="auto", project="mine"), tags=("t",), env={"WANDB_NAME": "mine"}
    )
    shell = {"WANDB_MODE": "disabled", "WANDB_PROJECT": "theirs", "WANDB_TAGS": "a", "WANDB_NAME": "theirs"}
    assert with_wandb(spec, shell) == (spec, {}, ())


def test_a_mode_that_wandb_does_not_have_is_refused() -> None:
    with pytest.raises(SpecError, match="WANDB_MODE=of"):
        with_wandb(JobSpec(entrypoint="x"), {"WANDB_MODE": "of"})


@pytest.mark.parametrize(
    ("spec", "environ"),
    [
        (JobSpec(entrypoint="x"), {}),
        (JobSpec(entrypoint="x", tracking=Tracking(mode="offline")), KEY),
        (JobSpec(entrypoint="x", tracking=Tracking(mode="disabled")), KEY),
        (JobSpec(entrypoint="x", secrets=("WANDB_API_KEY",)), KEY),
        (JobSpec(entrypoint="x", tracking=Tracking(mode="offline")), {**KEY, "WANDB_MODE": "online"}),
    ],
)
def test_no_wandb_key_is_sent_without_tracking(spec: JobSpec, environ: dict[str, str]) -> None:
    assert with_wandb(spec, environ) == (spec, {}, ())
