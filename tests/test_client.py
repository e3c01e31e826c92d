"""The client against the real API on a real port."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
from support.api import Api, serving, token_of
from support.waiting import wait_until

from raylaunch.client import Client, with_wandb
from raylaunch.errors import (
    AccessError,
    ClusterDownError,
    ClusterError,
    ConflictError,
    NotFoundError,
    TransferError,
    VersionError,
)
from raylaunch.packing import pack
from raylaunch.spec import JobSpec, Tracking
from raylaunch.state import AttemptView, Change, JobState, JobView
from raylaunch.transfer import CHUNK

_T = TypeVar("_T")


class Reach(NamedTuple):
    url: str
    token: str


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path / "store") as running:
        yield running


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text("print(1)\n")
    return folder


def ask(api: Api, verb: Callable[[Client], Coroutine[None, None, _T]], *, person: str = "tom") -> _T:
    """Run one verb with a person's token."""

    async def run() -> _T:
        async with Client(Reach(api.url, token_of(person)), cluster="test", patience_s=5) as client:
            return await asyncio.wait_for(verb(client), 60)

    return asyncio.run(run())


def submitted(api: Api, spec: JobSpec | None = None) -> JobView:
    wanted = spec or JobSpec(entrypoint="python train.py", name="digits", working_dir="")
    return ask(api, lambda client: client.submit(wanted)).job


def admitted(api: Api, job: str, n: int = 1) -> None:
    """Give the job its n-th attempt."""
    attempts = tuple(AttemptView(id=f"{job}-{one}", n=one, admitted_at=time.time()) for one in range(1, n + 1))
    api.do(lambda: api.records.update(job, kind="starting", message="starts", change=Change.ADMIT, attempts=attempts))


def ended(api: Api, job: str, change: Change = Change.SUCCEED) -> None:
    """End the job, its attempts replicated."""

    def end() -> None:
        attempts = tuple(
            one.model_copy(update={"replicated": True, "ended_at": time.time()})
            for one in api.records.get(job).attempts
        )
        api.records.update(job, kind="ended", message="ended", change=change, attempts=attempts)

    api.do(end)


def write(api: Api, job: str, name: str, data: bytes, *, known: bool = True) -> Path:
    """Put a file of a job into the store, as replication does."""
    path = api.store / "jobs" / job / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)
    if known:
        api.services.artifacts.note(job, name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    api.do(lambda: api.desk.grew(f"{job}-{name.partition('/')[0].removeprefix('attempt-')}"))
    return path


@contextmanager
def stranger(headers: dict[str, str]) -> Iterator[str]:
    """Serve something that is not our controller."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

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


def status_error(url: str) -> ClusterError:
    async def run() -> None:
        async with Client(Reach(url, "x")) as client:
            await client.status()

    with pytest.raises(ClusterError) as caught:
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
        "  → raylaunch up starts what is missing; raylaunch status shows what runs"
    )


def test_something_else_on_the_port_is_not_taken_for_the_controller() -> None:
    with stranger({}) as url:
        assert status_error(url).message == f"what answers at {url} is not the controller of a raylaunch cluster"


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        ("0", "raylaunch up starts a controller of this version; running jobs go on"),
        ("99", "install the controller's version here: pip install raylaunch==9.9"),
    ],
)
def test_a_controller_of_another_protocol_is_refused_and_says_what_to_do(number: str, hint: str) -> None:
    with stranger({"X-Raylaunch-Api": number, "X-Raylaunch-Version": "9.9"}) as url:
        error = status_error(url)
    assert isinstance(error, VersionError)
    assert error.hint == hint
    assert f"do not speak the same protocol (1 here, {number} there)" in error.message


def test_an_unknown_token_is_an_access_error(api: Api) -> None:
    with pytest.raises(AccessError):
        ask(api, lambda client: client.status(), person="mallory")


def test_the_status_says_who_is_asking(api: Api) -> None:
    status = ask(api, lambda client: client.status())
    assert (status.person, status.role) == ("tom", "trainer")


def test_a_submission_sends_code_report_and_git_facts(api: Api, code: Path) -> None:
    said: list[tuple[int, int]] = []

    async def submit(client: Client) -> JobView:
        spec = JobSpec(entrypoint="python train.py", working_dir=str(code))
        answer = await client.submit(spec, on_packed=lambda report, size: said.append((report.files, size)))
        return await client.job(answer.job.id)

    job = ask(api, submit)
    with pack(code) as packed:
        assert (api.store / "packages" / f"{packed.sha256}.tar.gz").read_bytes() == packed.file.read()
        assert said == [(1, packed.bytes)]
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


def test_an_upload_goes_on_where_an_earlier_one_stopped(api: Api, code: Path) -> None:
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
        await client.submit(JobSpec(entrypoint="y", working_dir=""), request_id="night")

    with pytest.raises(ConflictError):
        ask(api, thrice)


def test_two_submissions_without_a_request_id_are_two_jobs(api: Api) -> None:
    assert submitted(api).id != submitted(api).id


def test_a_dry_run_makes_no_job(api: Api) -> None:
    found = ask(api, lambda client: client.dry_run(JobSpec(entrypoint="python train.py")))
    assert found.message == "train would start on here at once"
    assert ask(api, lambda client: client.jobs()).total == 0


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


def test_waiting_returns_when_the_job_ends(api: Api) -> None:
    job = submitted(api)

    async def wait(client: Client) -> JobView:
        waiting = asyncio.ensure_future(client.wait("last"))
        await client.events(job.id)  # the wait is under way
        await asyncio.to_thread(admitted, api, job.id)
        await asyncio.to_thread(ended, api, job.id, Change.FAIL)
        return await waiting

    assert ask(api, wait).state is JobState.FAILED


def test_following_yields_each_event_once_and_ends_with_the_job(api: Api) -> None:
    job = submitted(api)

    async def follow(client: Client) -> list[str]:
        seen = []
        async for event in client.follow(job.id):
            seen.append(event.message)
            if len(seen) == 1:
                await asyncio.to_thread(admitted, api, job.id)
            elif event.message == "starts":
                await asyncio.to_thread(ended, api, job.id)
        return seen

    seen = ask(api, follow)
    assert seen[1:] == ["starts", "ended"]


def test_the_tail_of_a_log_says_where_to_read_on(api: Api) -> None:
    job = submitted(api)
    admitted(api, job.id)
    write(api, job.id, "attempt-1/logs/rank-0.log", b"one\ntwo\nthree\n")
    chunk = ask(api, lambda client: client.logs(job.id, tail=2))
    assert (chunk.data, chunk.offset, chunk.next_offset, chunk.size) == (b"two\nthree\n", 4, 14, 14)
    assert (chunk.attempt, chunk.ended) == (1, False)


def test_following_a_log_goes_through_all_attempts_to_the_end(api: Api) -> None:
    job = submitted(api)

    async def follow(client: Client) -> bytes:
        found = b""
        async for chunk in client.follow_logs(job.id):
            found += chunk.data
            if found.endswith(b"first\n"):
                await asyncio.to_thread(write, api, job.id, "attempt-1/logs/rank-0.log", b"more\xff\n", known=False)
            elif found.endswith(b"more\xff\n"):
                await asyncio.to_thread(second_attempt)
            elif found.endswith(b"second\n"):
                await asyncio.to_thread(ended, api, job.id)
        return found

    def second_attempt() -> None:
        def requeue() -> None:
            done = tuple(
                one.model_copy(update={"replicated": True, "ended_at": time.time()})
                for one in api.records.get(job.id).attempts
            )
            again = AttemptView(id=f"{job.id}-2", n=2, admitted_at=time.time())
            api.records.update(job.id, kind="requeued", change=Change.REQUEUE, attempts=done)
            api.records.update(job.id, kind="starting", change=Change.ADMIT, attempts=(*done, again))

        api.do(requeue)
        write(api, job.id, "attempt-2/logs/rank-0.log", b"second\n", known=False)

    admitted(api, job.id)
    write(api, job.id, "attempt-1/logs/rank-0.log", b"first\n", known=False)
    assert ask(api, follow) == b"first\nmore\xff\nsecond\n"


def test_following_the_log_of_a_job_that_ended_before_it_started_ends(api: Api) -> None:
    job = submitted(api)

    async def follow(client: Client) -> list[bytes]:
        await client.stop(job.id)
        return [chunk.data async for chunk in client.follow_logs(job.id)]

    assert ask(api, follow) == []


def test_a_log_is_searched(api: Api) -> None:
    job = submitted(api)
    admitted(api, job.id)
    write(api, job.id, "attempt-1/logs/rank-0.log", b"loss 1\nnothing\nLOSS 2\n")
    found = ask(api, lambda client: client.search_logs(job.id, "loss", ignore_case=True))
    assert [(match.offset, match.text) for match in found.matches] == [(0, "loss 1"), (15, "LOSS 2")]


def test_a_controller_that_restarts_elsewhere_is_found_again_and_that_is_said_once(tmp_path: Path) -> None:
    notices: list[str] = []
    with serving(tmp_path / "store") as before:
        job = submitted(before)
        here = [Reach(before.url, token_of("tom"))]

        async def heal() -> Reach:
            return here[-1]

        async def wait() -> JobView:
            async with Client(here[0], cluster="test", patience_s=30, on_notice=notices.append, heal=heal) as client:
                return await asyncio.wait_for(client.wait(job.id), 60)

        found: list[JobView] = []
        waiter = threading.Thread(target=lambda: found.append(asyncio.run(wait())))
        waiter.start()
    with serving(tmp_path / "store") as after:
        wait_until(lambda: notices, 20, "the loss is noticed")
        here.append(Reach(after.url, token_of("tom")))
        wait_until(lambda: len(notices) > 1, 20, "the controller is found again")
        ask(after, lambda client: client.stop(job.id))
        waiter.join(30)
    assert found[0].state is JobState.STOPPED
    lost = ("cluster 'test' does not answer at http://", "the connection to cluster 'test' at http://")
    assert notices[0].startswith(lost)  # the server was gone before the question, or in the middle of it
    assert notices[0].endswith("; trying again for 30 s")
    assert notices[1:] == ["cluster 'test' answers again"]


def test_outputs_are_downloaded_under_their_own_names_and_verified(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/best/model.pt", b"weights")
    write(api, job.id, "attempt-1/logs/rank-0.log", b"log")
    (done,) = ask(api, lambda client: client.download(job.id, dest=tmp_path / "here"))
    assert (done.local, done.fetched, done.verified) == (tmp_path / "here" / "best" / "model.pt", True, True)
    assert done.local.read_bytes() == b"weights"


def test_of_two_attempts_the_later_output_is_downloaded(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"early")
    write(api, job.id, "attempt-2/outputs/model.pt", b"late")
    (done,) = ask(api, lambda client: client.download(job.id, dest=tmp_path / "here"))
    assert done.local.read_bytes() == b"late"


def test_a_file_that_is_here_is_not_fetched_again(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    ask(api, lambda client: client.download(job.id, dest=tmp_path / "here"))
    (again,) = ask(api, lambda client: client.download(job.id, ["model.pt"], dest=tmp_path / "here"))
    assert not again.fetched


def test_a_file_that_is_there_is_not_replaced_where_that_is_not_wanted(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    (tmp_path / "model.pt").write_bytes(b"mine")
    with pytest.raises(ConflictError, match=r"model\.pt is there already, and is something else"):
        ask(api, lambda client: client.download(job.id, dest=tmp_path, replace=False))
    assert (tmp_path / "model.pt").read_bytes() == b"mine"


def part_of(tmp_path: Path, data: bytes) -> Path:
    return tmp_path / f".model.pt.{hashlib.sha256(data).hexdigest()[:12]}.part"


def test_an_interrupted_download_goes_on_where_it_stopped(api: Api, tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", data)
    part_of(tmp_path, data).write_bytes(data[:1_000_000])
    progress: list[int] = []

    async def download(client: Client) -> None:
        await client.download(job.id, dest=tmp_path, on_progress=lambda _what, done, _total: progress.append(done))

    ask(api, download)
    assert (tmp_path / "model.pt").read_bytes() == data
    assert progress[0] > 1_000_000
    assert not part_of(tmp_path, data).exists()


def test_a_download_with_another_checksum_is_refused_by_name_and_leaves_nothing(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    part_of(tmp_path, b"weights").write_bytes(b"wrong!!")
    with pytest.raises(TransferError, match=r"attempt-1/outputs/model\.pt did not arrive as it was sent"):
        ask(api, lambda client: client.download(job.id, dest=tmp_path))
    assert list(tmp_path.glob("*model.pt*")) == []


def test_a_file_that_is_not_there_is_answered_with_the_nearest(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    with pytest.raises(NotFoundError) as caught:
        ask(api, lambda client: client.download(job.id, ["modle.pt"], dest=tmp_path))
    assert caught.value.message == "the job has left no file 'modle.pt'"
    assert "model.pt" in caught.value.hint


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


def test_the_wandb_key_of_the_environment_goes_along_with_its_server() -> None:
    spec, secrets = with_wandb(JobSpec(entrypoint="x"), {**KEY, "WANDB_BASE_URL": "http://wandb.example"})
    assert secrets == KEY
    assert spec.env == {"WANDB_BASE_URL": "http://wandb.example"}


@pytest.mark.parametrize(
    ("spec", "environ"),
    [
        (JobSpec(entrypoint="x"), {}),
        (JobSpec(entrypoint="x", tracking=Tracking(mode="offline")), KEY),
        (JobSpec(entrypoint="x", tracking=Tracking(mode="disabled")), KEY),
        (JobSpec(entrypoint="x", secrets=("WANDB_API_KEY",)), KEY),
        (JobSpec(entrypoint="x"), {**KEY, "WANDB_MODE": "offline"}),
    ],
)
def test_no_wandb_key_goes_along_where_none_is_wanted(spec: JobSpec, environ: dict[str, str]) -> None:
    assert with_wandb(spec, environ) == (spec, {})
