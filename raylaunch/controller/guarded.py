"""What a route asks of a request before its body is read: the caller's role, and how large the body may be.

FastAPI reads a body before it calls anything of ours, and a header may say nothing about its size. So the role is
checked first, and bytes are counted while they arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive

from raylaunch.controller.auth import Caller, Role
from raylaunch.errors import AccessError, SpecError

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])

SMALL_BYTES = 64 * 1024
"""Most bytes of a body where a route says nothing else."""
_DRAIN_S = 5.0


@dataclass(frozen=True)
class Needs:
    """What a route needs of a request."""

    role: Role = Role.VIEWER
    what: str = "read"
    """What the route does, as it follows "may not"."""
    body_bytes: int = SMALL_BYTES


def needs(role: Role, what: str, *, body_bytes: int = SMALL_BYTES) -> Callable[[_Endpoint], _Endpoint]:
    """Say what a route needs; put below the router's own decorator.

    Args:
        role: the least role that may use it.
        what: what it does, as it follows "may not".
        body_bytes: most bytes of its body.
    """

    def noted(endpoint: _Endpoint) -> _Endpoint:
        endpoint.__dict__["needs"] = Needs(role, what, body_bytes)
        return endpoint

    return noted


class GuardedRoute(APIRoute):
    """A route that checks what its endpoint needs first."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with the checks in front."""
        needed: Needs = getattr(self.endpoint, "needs", Needs())
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            caller: Caller = request.state.caller
            try:
                caller.require(needed.role, needed.what)
            except AccessError:
                await _drain(request.receive, needed.body_bytes)
                raise
            body = await _body(request, needed.body_bytes)
            return await handle(Request(request.scope, _replaying(body, request.receive)))

        return guarded


async def _body(request: Request, most: int) -> bytes:
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > len(str(most)) or int(said) > most):
        raise _too_large(most)
    body = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] != "http.request":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most:
            raise _too_large(most)
    return bytes(body)


async def _drain(receive: Receive, most: int) -> None:
    """Drop what arrives of a body, up to a limit: a client that still sends would otherwise not read the answer."""
    left = most
    with anyio.move_on_after(_DRAIN_S):
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read once more, and then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _too_large(most: int) -> SpecError:
    size = f"{most // 1024 // 1024} MiB" if most >= 1024 * 1024 else f"{most // 1024} KiB"
    return SpecError(f"the request's body is larger than {size}", hint="send less at once")
