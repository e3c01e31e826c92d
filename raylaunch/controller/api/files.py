"""Routes about uploaded packages, and about what jobs produce: metrics and files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import anyio
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.convertors import PathConvertor, register_url_convertor

from raylaunch.controller.api.dependencies import (
    MAX_INT,
    App,
    AppState,
    CurrentCaller,
    GuardedRoute,
    Job,
    require_ours,
    requires,
)
from raylaunch.controller.api.responses import error_response, file_response, json_response, model_response
from raylaunch.controller.store.access import Caller, Role
from raylaunch.controller.store.packages import PIECE_BYTES, PackageBytes, WrongOffsetError
from raylaunch.controller.store.record import JobRecord
from raylaunch.errors import AccessError, NotFoundError
from raylaunch.models.job import Artifact, MetricsPage

router = APIRouter(route_class=GuardedRoute)
_LINES = 1000
Keys = Annotated[list[str] | None, Query(alias="key", description="names of metrics; may be repeated")]


@router.head("/packages/{sha}", response_class=Response)
@requires(Role.TRAINER, "send packages")
async def package_have(sha: str, app: App) -> Response:
    """Return in headers how much of a package has been uploaded."""
    return Response(None, 200, _headers(app.packages.have(sha)))


@router.put("/packages/{sha}")
@requires(Role.TRAINER, "send packages", body_bytes=PIECE_BYTES)
async def put_package(
    sha: str,
    request: Request,
    app: App,
    *,
    offset: Annotated[int, Query(ge=0, le=MAX_INT)],
    total: Annotated[int, Query(ge=1, le=MAX_INT)],
) -> Response:
    """Store one piece of a package."""
    request.state.about = sha
    data = await request.body()
    try:
        have = await anyio.to_thread.run_sync(partial(app.packages.put, sha, offset=offset, total=total, data=data))
    except WrongOffsetError as error:
        return error_response(error, headers={"X-Have": str(error.have), "X-Complete": "0"})
    request.state.audited = have.complete
    return json_response({"have": have.bytes, "complete": have.complete}, headers=_headers(have))


def _headers(have: PackageBytes) -> dict[str, str]:
    return {"X-Have": str(have.bytes), "X-Complete": "1" if have.complete else "0"}


class _FileName(PathConvertor):
    """Like starlette's path, but may contain line feeds, as file names may."""

    regex = "(?s:.*)"


register_url_convertor("file", _FileName())


@router.get("/jobs/{ref}/metrics", response_model=MetricsPage)
async def metrics(
    record: Job, app: App, keys: Keys = None, max_points: Annotated[int, Query(ge=2, le=100_000)] = 500
) -> Response:
    """Return the metrics' names and last values, and points of the requested ones."""
    require_ours(record, "metrics")
    page = await anyio.to_thread.run_sync(partial(app.metrics.page, record, keys=keys or [], max_points=max_points))
    return model_response(page)


@router.get("/jobs/{ref}/metrics.csv", response_class=StreamingResponse)
async def metrics_csv(record: Job, app: App, keys: Keys = None) -> Response:
    """Return every point as CSV: step,at,key,value."""
    require_ours(record, "metrics")
    lines = iter(app.metrics.csv(record, keys=keys or []))
    first = await anyio.to_thread.run_sync(next, lines, "")  # an unreadable file is an error, not half a response
    return StreamingResponse(_encoded(chain([first], lines)), 200, None, "text/csv")


@router.get("/jobs/{ref}/files", response_model=list[Artifact])
async def files(record: Job, app: App) -> Response:
    """Return the files of a job."""
    require_ours(record, "files")
    found = await anyio.to_thread.run_sync(app.artifacts.files, record.id)
    return model_response(found)


@router.head("/jobs/{ref}/files/{path:file}", response_class=Response, include_in_schema=False)
@router.get("/jobs/{ref}/files/{path:file}", response_class=Response)
async def file(record: Job, path: str, request: Request, app: App, caller: CurrentCaller) -> Response:
    """Return one file, or a range of it. An output that was not kept is copied from its node first."""
    require_ours(record, "files")
    try:
        where, artifact = await anyio.to_thread.run_sync(app.artifacts.path, record.id, path)
    except NotFoundError:
        left = await anyio.to_thread.run_sync(app.artifacts.left, record.id)
        name = left.name_of(path)
        if not name:
            raise
        where, artifact = await _left(record, name, app, caller, withheld=name in left.withheld)
    headers = {"X-File": quote(str(where))}  # a user of this host who may read it needs no download
    if artifact.sha256:
        headers["X-Sha256"] = artifact.sha256
    return file_response(where, request, headers=headers)


async def _left(
    record: JobRecord, name: str, app: AppState, caller: Caller, *, withheld: bool
) -> tuple[Path, Artifact]:
    """Copy an output that was not kept; one that looks like a secret only for its owner, and into a separate folder."""
    caller.require(Role.TRAINER, "fetch files that were not kept from")
    if not withheld:
        await app.jobs.bring_left(record, name)
        return await anyio.to_thread.run_sync(app.artifacts.path, record.id, name)
    if caller.person != record.owner:
        msg = f"{name} looks like a secret; only the job's owner, {record.owner}, can fetch it"
        raise AccessError(msg)
    try:
        return await anyio.to_thread.run_sync(app.artifacts.withheld, record.id, name)
    except NotFoundError:
        await app.jobs.bring_left(record, name)
    return await anyio.to_thread.run_sync(app.artifacts.withheld, record.id, name)


async def _encoded(lines: Iterator[str]) -> AsyncIterator[bytes]:
    while text := await anyio.to_thread.run_sync(_some, lines):
        yield text.encode()


def _some(lines: Iterator[str]) -> str:
    return "".join(islice(lines, _LINES))
