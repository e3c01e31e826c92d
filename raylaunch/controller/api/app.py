"""The HTTP API: middleware, routes and error responses as a FastAPI app, and the server that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from raylaunch.controller.api import cluster, files, jobs, logs
from raylaunch.controller.api.dependencies import AppState
from raylaunch.controller.api.middleware import AuthMiddleware
from raylaunch.controller.api.responses import error_response
from raylaunch.controller.store.audit import AuditLog
from raylaunch.errors import NotFoundError, RaylaunchError, SpecError
from raylaunch.version import __version__

_POLL_S = 0.25
_log = logging.getLogger(__name__)
_NOT_FOUND = 404
_MAX_PROBLEMS = 3


class ApiServer(uvicorn.Server):
    """Serves the API. Set `should_exit` to stop it: long polls and event streams then return immediately.

    The program handles signals itself: uvicorn's handlers are not installed.
    """

    def __init__(self, state: AppState) -> None:
        self._state = state
        super().__init__(
            uvicorn.Config(
                create_app(state),
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving. Accepted connections inherit the option that is set here.

        Without it response headers are delayed by 40 ms, until the previous packet is acknowledged: asyncio sets it
        only on sockets that were created with TCP's protocol number, which listeners passed in are not.
        """
        for listener in sockets or []:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().startup(sockets)

    async def main_loop(self) -> None:
        """Wait for the end. uvicorn's own loop wakes ten times a second, for a date header and a request limit."""
        await self.on_tick(0)
        while not self.should_exit:  # noqa: ASYNC110 -- uvicorn's attribute, not an event
            await asyncio.sleep(_POLL_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wake all that wait, then shut down."""
        self._state.closing.set()
        await super().shutdown(sockets)


def create_app(state: AppState) -> FastAPI:
    """Return the app that serves `state`."""
    app = FastAPI(
        title="raylaunch controller",
        version=__version__,
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.parts = state
    app.add_middleware(AuthMiddleware, tokens=state.tokens, invitations=state.invitations, audit=AuditLog(state.store))
    app.add_exception_handler(RaylaunchError, _known_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _bug)
    for module in (cluster, jobs, logs, files):
        app.include_router(module.router, prefix="/v1")
    return app


async def _known_error(_request: Request, error: Exception) -> Response:
    """Respond with an error that a person should act on."""
    if not isinstance(error, RaylaunchError):
        raise error
    return error_response(error)


async def _invalid_request(_request: Request, error: Exception) -> Response:
    """Report what is invalid in a request: field and reason, never the value, which may be a secret."""
    if not isinstance(error, RequestValidationError):
        raise error
    problems = []
    for problem in error.errors()[:_MAX_PROBLEMS]:
        field = ".".join(str(part) for part in problem["loc"][1:])
        problems.append(f"{field}: {problem['msg']}" if field else str(problem["msg"]))
    message = "invalid request: " + "; ".join(problems)
    return error_response(SpecError(message, hint="see GET /v1/openapi.json"))


async def _no_route(request: Request, error: Exception) -> Response:
    """Respond for a path or a method that does not exist."""
    if not isinstance(error, HTTPException):
        raise error
    hint = "GET /v1/openapi.json lists what there is"
    if error.status_code == _NOT_FOUND:
        return error_response(NotFoundError(f"there is no {request.url.path} here", hint=hint))
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(RaylaunchError(message, hint=hint), status=error.status_code, headers=error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    """Respond for a bug; uvicorn writes its traceback to the controller's log."""
    message = f"the controller failed at {request.method} {request.url.path}: {type(error).__name__}"
    return error_response(RaylaunchError(message, hint="its log has the traceback; raylaunch status shows its path"))
