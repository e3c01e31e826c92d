"""The client where it waits: for the end of a job, for its events, for its log, for a controller that is away."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

from support.api import Api, serving
from support.client_use import admitted, ask, ended, submitted, write
from support.waiting import wait_until

from raylaunch.client.client import Client
from raylaunch.cluster.types import Endpoint
from raylaunch.models.job import AttemptView, JobView
from raylaunch.models.states import Change, JobState


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


def test_the_tail_of_a_log_reports_where_to_continue(api: Api) -> None:
    job = submitted(api)
    admitted(api, job.id)
    write(api, job.id, "attempt-1/logs/rank-0.log", b"one\ntwo\nthree\n")
    chunk = ask(api, lambda client: client.logs(job.id, tail=2))
    assert (chunk.data, chunk.offset, chunk.next_offset, chunk.size) == (b"two\nthree\n", 4, 14, 14)
    assert (chunk.attempt, chunk.ended) == (1, False)


def test_following_a_log_covers_all_attempts_until_the_end(api: Api) -> None:
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


def test_a_controller_that_restarts_elsewhere_is_found_and_reported_once(tmp_path: Path) -> None:
    notices: list[str] = []
    with serving(tmp_path / "store") as before:
        job = submitted(before)
        here = [before.reach()]

        async def heal() -> Endpoint:
            return here[-1]

        async def wait() -> JobView:
            async with Client(here[0], cluster="test", patience_s=30, on_notice=notices.append, restart=heal) as client:
                return await asyncio.wait_for(client.wait(job.id), 60)

        found: list[JobView] = []
        waiter = threading.Thread(target=lambda: found.append(asyncio.run(wait())))
        waiter.start()
    with serving(tmp_path / "store") as after:
        wait_until(lambda: notices, 60, "the loss is noticed")
        here.append(after.reach())
        wait_until(lambda: len(notices) > 1, 60, "the controller is found again")
        ask(after, lambda client: client.stop(job.id))
        waiter.join(30)
    assert found[0].state is JobState.STOPPED
    lost = ("cluster 'test' does not answer at http://", "the connection to cluster 'test' at http://")
    assert notices[0].startswith(lost)  # the server was gone before the question, or in the middle of it
    assert notices[0].endswith("; retrying for 30 s")
    assert notices[1:] == ["cluster 'test' is responding again"]
