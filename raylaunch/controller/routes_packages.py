"""Routes about packages: what is here of one, and its pieces."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import anyio
from fastapi import APIRouter, Query, Request, Response

from raylaunch.controller.answers import error_answer, json_answer
from raylaunch.controller.asking import LARGEST, Has
from raylaunch.controller.auth import Role
from raylaunch.controller.guarded import GuardedRoute, needs
from raylaunch.controller.packages import PIECE_BYTES, Have, WrongOffsetError

router = APIRouter(route_class=GuardedRoute)


@router.head("/packages/{sha}", response_class=Response)
@needs(Role.TRAINER, "send packages")
async def package_have(sha: str, services: Has) -> Response:
    """Say in headers how much of a package is here."""
    return Response(None, 200, _headers(services.packages.have(sha)))


@router.put("/packages/{sha}")
@needs(Role.TRAINER, "send packages", body_bytes=PIECE_BYTES)
async def put_package(
    sha: str,
    request: Request,
    services: Has,
    *,
    offset: Annotated[int, Query(ge=0, le=LARGEST)],
    total: Annotated[int, Query(ge=1, le=LARGEST)],
) -> Response:
    """Take one piece of a package."""
    request.state.about = sha
    data = await request.body()
    try:
        have = await anyio.to_thread.run_sync(
            partial(services.packages.put, sha, offset=offset, total=total, data=data)
        )
    except WrongOffsetError as error:
        return error_answer(error, headers={"X-Have": str(error.have), "X-Complete": "0"})
    request.state.audited = have.complete
    return json_answer({"have": have.bytes, "complete": have.complete}, headers=_headers(have))


def _headers(have: Have) -> dict[str, str]:
    return {"X-Have": str(have.bytes), "X-Complete": "1" if have.complete else "0"}
