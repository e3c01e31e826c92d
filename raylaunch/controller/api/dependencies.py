"""What routes get with a request: the application's state, the caller, the job; and helpers for long polls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import anyio
from fastapi import Depends, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from raylaunch.controller.metrics.reader import MetricsStore
from raylaunch.controller.scheduler.external_logs import ExternalLogs
from raylaunch.controller.scheduler.host_service import HostService
from raylaunch.controller.scheduler.job_service import JobService
from raylaunch.controller.settings import Settings
from raylaunch.controller.store.access import Caller, Invitations, Role, TokenStore
from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.database import nearest
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.packages import PackageStore
from raylaunch.controller.store.record import JobRecord
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.errors import AccessError, NotFoundError, NotYoursError, SpecError, whose
from raylaunch.version import OTHERS_JOB, OTHERS_OWNER

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])

SMALL_BYTES = 64 * 1024
"""Default limit of a request body, in bytes."""
_DRAIN_S = 5.0
_SEARCHES = 4
WAIT_S = 25.0
"""Longest wait of a long poll."""
MAX_INT = (1 << 63) - 1
"""The largest integer that files and the database support."""
JOIN_PATH = "/v1/join"
"""The only path that accepts an invitation's code."""
WaitS = Annotated[
    float, Query(ge=0, le=WAIT_S, allow_inf_nan=False, description="how long to wait for a change, seconds")
]


class RequestBody(BaseModel):
    """The body of a request. Unknown fields are an error."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class RouteRequirements:
    """What a route requires of a request."""

    role: Role = Role.VIEWER
    what: str = "read"
    """What the route does, as it follows "may not"."""
    body_bytes: int = SMALL_BYTES


def requires(role: Role, what: str, *, body_bytes: int = SMALL_BYTES) -> Callable[[_Endpoint], _Endpoint]:
    """Declare what a route requires; place it below the router's decorator.

    Args:
        role: the lowest role that may use it.
        what: what it does, as it follows "may not".
        body_bytes: limit of its body.
    """

    def noted(endpoint: _Endpoint) -> _Endpoint:
        endpoint.__dict__["requires"] = RouteRequirements(role, what, body_bytes)
        return endpoint

    return noted


class GuardedRoute(APIRoute):
    """A route that first checks what its endpoint requires."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with the checks."""
        required: RouteRequirements = getattr(self.endpoint, "requires", RouteRequirements())
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            caller: Caller = request.state.caller
            try:
                caller.require(required.role, required.what)
            except AccessError:
                await _drain(request.receive, required.body_bytes)
                raise
            request = Request(request.scope, _limited(request, required.body_bytes))
            try:
                await request.body()  # starlette caches it
            except ClientDisconnect:
                msg = "the connection was closed before the whole body had arrived"
                raise SpecError(msg) from None
            return await handle(request)

        return guarded


def _limited(request: Request, most: int) -> Receive:
    """Return a receive function that refuses a body of more than `most` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > len(str(most)) or int(declared) > most):
        raise _too_large(most)
    left = most

    async def receive() -> Message:
        nonlocal left
        message = await request.receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise _too_large(most)
        return message

    return receive


async def _drain(receive: Receive, most: int) -> None:
    """Discard a body up to a limit: a client that is still sending would otherwise not read the response."""
    left = most
    with anyio.move_on_after(_DRAIN_S):
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return


def _too_large(most: int) -> SpecError:
    size = f"{most // 1024 // 1024} MiB" if most >= 1024 * 1024 else f"{most // 1024} KiB"
    return SpecError(f"the request's body is larger than {size}", hint="send less at once")


@dataclass(frozen=True)
class AppState:
    """The application's state: all parts that routes use."""

    settings: Settings
    store: Path
    records: Records
    packages: PackageStore
    secrets: SecretStore
    tokens: TokenStore
    invitations: Invitations
    artifacts: Artifacts
    metrics: MetricsStore
    jobs: JobService
    hosts: HostService
    external_logs: ExternalLogs
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server shuts down: long polls then return immediately."""
    searches: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(_SEARCHES))
    """Searches run in their own threads: they may take long, and must not delay anything else."""


async def _app(request: Request) -> AppState:
    app: AppState = request.app.state.parts
    return app


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


App = Annotated[AppState, Depends(_app)]
CurrentCaller = Annotated[Caller, Depends(_caller)]


async def find_job(ref: str, app: AppState, caller: Caller) -> str:
    """Return the id of the job that `ref` refers to, as `Records.find` does.

    Raises:
        NotFoundError: there is none; the hint lists similar ones.
    """
    try:
        return app.records.find(ref, owner=caller.person)
    except NotFoundError as error:
        near = await anyio.to_thread.run_sync(nearest, ref, app.records.refs())
        if not near:
            raise
        raise NotFoundError(error.message, hint=f"did you mean {' or '.join(near)}?") from None


async def _job(ref: str, request: Request, app: App, caller: CurrentCaller) -> JobRecord:
    return _named(request, ref, app.records.by_id(await find_job(ref, app, caller)), caller)


async def _light_job(ref: str, request: Request, app: App, caller: CurrentCaller) -> JobRecord:
    return _named(request, ref, app.records.light(await find_job(ref, app, caller)), caller)


async def _own_job(ref: str, record: Annotated[JobRecord, Depends(_job)], caller: CurrentCaller) -> JobRecord:
    refuse_others(caller, record, ref)
    return record


def _named(request: Request, ref: str, record: JobRecord, caller: Caller) -> JobRecord:
    """Note the job for the audit log; if a name refers to somebody else's job, response headers report that."""
    request.state.about = record.id
    if ref != record.id and record.owner != caller.person:
        request.state.headers = {OTHERS_JOB: quote(record.id), OTHERS_OWNER: quote(record.owner)}
    return record


Job = Annotated[JobRecord, Depends(_job)]
"""By id or name; the caller's own jobs take precedence. For reading."""
OwnJob = Annotated[JobRecord, Depends(_own_job)]
"""By id or name; a name refers to the caller's own jobs only. For changing or stopping a job."""
LightJob = Annotated[JobRecord, Depends(_light_job)]
"""Without its heavy fields: for frequent requests."""


def refuse_others(caller: Caller, record: JobRecord, ref: str) -> None:
    """Refuse a name that refers to somebody else's job.

    Raises:
        NotYoursError: it does.
    """
    if ref != record.id and record.owner != caller.person:
        raise NotYoursError.of(ref, job=record.id, owner=record.owner)


def require_own(caller: Caller, record: JobRecord, what: str) -> None:
    """Require that the caller may change this job: as its owner with the role trainer, or as an operator.

    Raises:
        AccessError: the caller may not.
    """
    caller.require(Role.TRAINER, f"{what} jobs")
    if record.owner != caller.person and not caller.role.allows(Role.OPERATOR):
        msg = f"{caller.person} may not {what} {record.id}, {whose(record.owner)}"
        raise AccessError(msg, hint="its owner and operators may")


def pick_attempt(record: JobRecord, n: int | None) -> int:
    """Return the number of the requested attempt: `n`, or the latest; 0 before the first.

    Raises:
        NotFoundError: there is no attempt `n`.
    """
    if n is not None and not 1 <= n <= len(record.attempts):
        has = f"it has {len(record.attempts)}" if record.attempts else "it has not started yet"
        msg_0 = f"{record.id} has no attempt {n}"
        raise NotFoundError(msg_0, hint=has)
    return n or len(record.attempts)


def require_ours(record: JobRecord, what: str) -> None:
    """Refuse what raylaunch does not store of an external job.

    Raises:
        NotFoundError: the job is external.
    """
    if record.foreign:
        msg = f"{record.id} was submitted with plain ray job submit: raylaunch stores no {what} of it"
        raise NotFoundError(msg, hint=f"its log: raylaunch logs {record.id}; raylaunch run stores everything")


async def wait_first(*waits: Coroutine[object, object, object], timeout_s: float) -> None:
    """Return when one of `waits` is done, or at the timeout; the others are cancelled.

    Raises:
        Exception: the first of them raised it.
    """
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def finished(task: asyncio.Future[None]) -> None:
    """Wait until `task` is done, without cancelling it when this is cancelled."""
    await asyncio.wait([task])


@asynccontextmanager
async def client_disconnect(request: Request) -> AsyncIterator[asyncio.Future[None]]:
    """Yield a future that is done once the client has disconnected. Use it after the body was read.

    Without it, a long poll would continue for a client that has disconnected.
    """

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(wait_for_disconnect())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
