"""The client against a running API: a verb at a time, and what becomes of a job meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

from raylaunch.client.client import Client
from raylaunch.models.job import AttemptView, JobView
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import Change
from support.api import Api

_T = TypeVar("_T")


def ask(api: Api, verb: Callable[[Client], Coroutine[None, None, _T]], *, person: str = "tom") -> _T:
    """Run one verb with a person's token."""

    async def run() -> _T:
        async with Client(api.reach(person), cluster="test", patience_s=5) as client:
            return await asyncio.wait_for(verb(client), 60)

    return asyncio.run(run())


def submitted(api: Api, spec: JobSpec | None = None) -> JobView:
    wanted = spec or JobSpec(entrypoint="python -m train", name="digits", working_dir="")
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
        api.state.artifacts.note(job, name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    api.do(lambda: api.desk.grew(f"{job}-{name.partition('/')[0].removeprefix('attempt-')}"))
    return path
