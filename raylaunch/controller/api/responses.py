"""Responses: models as JSON, errors in one format, files with ranges."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import anyio
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, JsonValue
from starlette.background import BackgroundTask

from raylaunch.errors import RaylaunchError
from raylaunch.version import API, __version__

VERSION_HEADERS = {"X-Raylaunch-Version": __version__, "X-Raylaunch-Api": str(API)}
"""Headers of every response."""

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_BLOCK = 1024 * 1024


def model_response(value: BaseModel | Sequence[BaseModel]) -> Response:
    """Return a model, or several, as JSON."""
    if isinstance(value, BaseModel):
        return json_response(value.model_dump(mode="json"))
    return json_response([item.model_dump(mode="json") for item in value])


def json_response(
    data: JsonValue,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    background: BackgroundTask | None = None,
) -> Response:
    """Return JSON. NaN and infinity (some losses are) become strings, which our models and other programs accept."""
    try:
        text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_json_safe(data), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    body = text.encode(errors="backslashreplace")
    return Response(body, status, dict(headers or {}), "application/json", background=background)


def error_response(error: RaylaunchError, *, status: int = 0, headers: Mapping[str, str] | None = None) -> Response:
    """Return ``{"error": {"code", "message", "hint"}}`` with the error's own status, or another."""
    body: JsonValue = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
    return json_response(body, status=status or error.status, headers={**VERSION_HEADERS, **(headers or {})})


def file_response(path: Path, request: Request, *, headers: Mapping[str, str]) -> Response:
    """Return a file's bytes as they are now, or the requested range (206; 416 if it is beyond the end).

    A file that grows meanwhile is sent up to its size at the start.
    """
    facts = path.stat()
    size = facts.st_size
    etag = f'"{facts.st_mtime_ns:x}-{size:x}"'
    common = {**headers, "Accept-Ranges": "bytes", "ETag": etag}
    span = _span(request, size, etag)
    if span is None:
        start, end, status = 0, size, 200
    elif span[0] >= size:
        error = RaylaunchError(f"the file has {size} bytes", hint="request a range within it")
        return error_response(error, status=416, headers={"Content-Range": f"bytes */{size}"})
    else:
        start, end, status = span[0], min(span[1], size), 206
        common["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    common["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(None, status, common, "application/octet-stream")
    return StreamingResponse(_bytes(path, facts, start, end), status, common, "application/octet-stream")


def _json_safe(data: JsonValue) -> JsonValue:
    match data:
        case float() if math.isnan(data):
            return "NaN"
        case float() if math.isinf(data):
            return "Infinity" if data > 0 else "-Infinity"
        case dict():
            return {key: _json_safe(value) for key, value in data.items()}
        case list():
            return [_json_safe(value) for value in data]
        case _:
            return data


def _span(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """Return the requested range, or None for the whole file (RFC 9110, sections 14.2 and 13.1.5)."""
    match = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if match is None or match.group(0) == "bytes=-" or request.headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), int(last) + 1 if last else size


async def _bytes(path: Path, facts: os.stat_result, start: int, end: int) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        if os.fstat(file.wrapped.fileno()).st_ino != facts.st_ino:
            msg = f"{path} was replaced before it was sent"  # the connection is closed; the client retries
            raise RuntimeError(msg)
        await file.seek(start)
        while start < end:
            data = await file.read(min(_BLOCK, end - start))
            if not data:
                msg = f"{path} became shorter while it was being sent"
                raise RuntimeError(msg)
            start += len(data)
            yield data
