"""What routes take from a request: the services, who asks, and the job that is meant."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import anyio
from fastapi import Depends, Query, Request

from raylaunch.controller.auth import Caller, Role
from raylaunch.controller.record import JobRecord
from raylaunch.controller.search import nearest
from raylaunch.controller.services import Services
from raylaunch.errors import AccessError, NotFoundError, NotYoursError, whose
from raylaunch.version import OTHERS_JOB, OTHERS_OWNER

WAIT_S = 25.0
"""Longest that an answer is held back for news."""


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


Has = Annotated[Services, Depends(_services)]
Who = Annotated[Caller, Depends(_caller)]


async def find(ref: str, services: Services, caller: Caller) -> str:
    """Return the id of the job that a person means, as `Records.find` does.

    Raises:
        NotFoundError: there is none; the hint names those that resemble it.
    """
    try:
        return services.records.find(ref, owner=caller.person)
    except NotFoundError as error:
        near = await anyio.to_thread.run_sync(nearest, ref, services.records.refs())
        if not near:
            raise
        raise NotFoundError(error.message, hint=f"did you mean {' or '.join(near)}?") from None


async def _job(ref: str, request: Request, services: Has, caller: Who) -> JobRecord:
    return _named(request, ref, services.records.by_id(await find(ref, services, caller)), caller)


async def _light_job(ref: str, request: Request, services: Has, caller: Who) -> JobRecord:
    return _named(request, ref, services.records.light(await find(ref, services, caller)), caller)


async def _own_job(ref: str, record: Annotated[JobRecord, Depends(_job)], caller: Who) -> JobRecord:
    refuse_others(caller, record, ref)
    return record


def _named(request: Request, ref: str, record: JobRecord, caller: Caller) -> JobRecord:
    """Note which job is meant; where a name means somebody else's, the answer says so."""
    request.state.about = record.id
    if ref != record.id and record.owner != caller.person:
        request.state.headers = {OTHERS_JOB: quote(record.id), OTHERS_OWNER: quote(record.owner)}
    return record


Job = Annotated[JobRecord, Depends(_job)]
"""By id or name; a name means the caller's own jobs first. For what reads."""
OwnJob = Annotated[JobRecord, Depends(_own_job)]
"""A name means the caller's own jobs alone. For what changes or ends a job."""
LightJob = Annotated[JobRecord, Depends(_light_job)]
"""Without its heavy fields: for what is asked again and again."""
LARGEST = (1 << 63) - 1
"""The largest whole number that files and the database take."""
WaitS = Annotated[float, Query(ge=0, le=WAIT_S, allow_inf_nan=False, description="how long to wait for news, seconds")]


def refuse_others(caller: Caller, record: JobRecord, ref: str) -> None:
    """Refuse a name that means somebody else's job.

    Raises:
        NotYoursError: it does.
    """
    if ref != record.id and record.owner != caller.person:
        raise NotYoursError.of(ref, job=record.id, owner=record.owner)


def require_own(caller: Caller, record: JobRecord, what: str) -> None:
    """Let through who may change this job: its owner as a trainer, anybody as an operator.

    Raises:
        AccessError: the caller may not.
    """
    caller.require(Role.TRAINER, f"{what} jobs")
    if record.owner != caller.person and not caller.role.allows(Role.OPERATOR):
        msg = f"{caller.person} may not {what} {record.id}, {whose(record.owner)}"
        raise AccessError(msg, hint="its owner may, and whoever has the role operator")


def pick_attempt(record: JobRecord, n: int | None) -> int:
    """Return the number of the attempt that is meant: `n`, or the latest; 0 before the first.

    Raises:
        NotFoundError: there is no attempt `n`.
    """
    if n is not None and not 1 <= n <= len(record.attempts):
        has = f"it has {len(record.attempts)}" if record.attempts else "it has not started yet"
        msg_0 = f"{record.id} has no attempt {n}"
        raise NotFoundError(msg_0, hint=has)
    return n or len(record.attempts)


def require_ours(record: JobRecord, what: str) -> None:
    """Refuse what raylaunch does not have of a job of plain Ray.

    Raises:
        NotFoundError: the job is one.
    """
    if record.foreign:
        msg = f"{record.id} was submitted with plain ray job submit: raylaunch keeps no {what} of it"
        raise NotFoundError(
            msg, hint=f"its log: raylaunch logs {record.id}; what is submitted with raylaunch keeps all"
        )
