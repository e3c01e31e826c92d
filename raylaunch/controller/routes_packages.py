"""Routes about packages: what is here of one, and its pieces."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import anyio
from fastapi import APIRouter, Query, Request, Response

from raylaunch.controller.answers import error_answer, json_answer
from raylaunch.controller.asking import Has, Who
from raylaunch.controller.auth import Role
from raylaunch.controller.packages import PIECE_BYTES, Have, WrongOffsetError
from raylaunch.errors import SpecError

router = APIRouter()


@router.head("/packages/{sha}", response_class=Response)
async def package_have(sha: str, services: Has, caller: Who) -> Response:
    """Say in headers how much of a package is here."""
    caller.require(Role.TRAINER, "send packages")
    return Response(None, 200, _headers(services.packages.have(sha)))


@router.put("/packages/{sha}")
async def put_package(  # noqa: PLR0913 -- each is one fact of the piece
    sha: str,
    request: Request,
    services: Has,
    caller: Who,
    *,
    offset: Annotated[int, Query(ge=0)],
    total: Annotated[int, Query(ge=1)],
) -> Response:
    """Take one piece of a package."""
    caller.require(Role.TRAINER, "send packages")
    request.state.about = sha
    data = await _body(request)
    try:
        have = await anyio.to_thread.run_sync(
            partial(services.packages.put, sha, offset=offset, total=total, data=data)
        )
    except WrongOffsetError as error:
        return error_answer(error, headers={"X-Have": str(error.have), "X-Complete": "0"})
    request.state.audited = have.complete
    return json_answer({"have": have.bytes, "complete": have.complete}, headers=_headers(have))


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > PIECE_BYTES:
            msg = f"a piece of a package is larger than {PIECE_BYTES} bytes"
            raise SpecError(msg, hint="send it in smaller pieces")
    return bytes(data)


def _headers(have: Have) -> dict[str, str]:
    return {"X-Have": str(have.bytes), "X-Complete": "1" if have.complete else "0"}
