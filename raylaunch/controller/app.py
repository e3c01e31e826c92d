"""The HTTP API: `create_app` puts gate, routes and error answers together."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from raylaunch.controller import (
    routes_cluster,
    routes_data,
    routes_events,
    routes_hosts,
    routes_jobs,
    routes_logs,
    routes_packages,
    routes_tokens,
)
from raylaunch.controller.answers import error_answer
from raylaunch.controller.audit import AuditLog
from raylaunch.controller.gate import Gate
from raylaunch.controller.services import Services
from raylaunch.errors import NotFoundError, RaylaunchError, SpecError
from raylaunch.version import __version__

_log = logging.getLogger(__name__)

_NOT_FOUND = 404
_SAID = 3


def create_app(services: Services) -> FastAPI:
    """Return the API over `services`."""
    app = FastAPI(
        title="raylaunch controller",
        version=__version__,
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    app.add_middleware(Gate, tokens=services.tokens, invitations=services.invitations, audit=AuditLog(services.store))
    app.add_exception_handler(RaylaunchError, _said)
    app.add_exception_handler(RequestValidationError, _not_understood)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _bug)
    for routes in (
        routes_cluster,
        routes_hosts,
        routes_jobs,
        routes_events,
        routes_logs,
        routes_data,
        routes_packages,
        routes_tokens,
    ):
        app.include_router(routes.router, prefix="/v1")
    return app


async def _said(_request: Request, error: Exception) -> Response:
    """Answer with an error that a person should act on."""
    if not isinstance(error, RaylaunchError):
        raise error
    return error_answer(error)


async def _not_understood(_request: Request, error: Exception) -> Response:
    """Answer what was wrong with a request: field and reason, never the value, which may be a secret."""
    if not isinstance(error, RequestValidationError):
        raise error
    said = []
    for problem in error.errors()[:_SAID]:
        field = ".".join(str(part) for part in problem["loc"][1:])
        said.append(f"{field}: {problem['msg']}" if field else str(problem["msg"]))
    message = "the request is not understood: " + "; ".join(said)
    return error_answer(SpecError(message, hint="GET /v1/openapi.json describes what is"))


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that does not exist."""
    if not isinstance(error, HTTPException):
        raise error
    hint = "GET /v1/openapi.json lists what there is"
    if error.status_code == _NOT_FOUND:
        return error_answer(NotFoundError(f"there is no {request.url.path} here", hint=hint))
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_answer(RaylaunchError(message, hint=hint), status=error.status_code, headers=error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    """Answer for a bug; uvicorn writes its traceback to the controller's log."""
    message = f"the controller failed at {request.method} {request.url.path}: {type(error).__name__}"
    return error_answer(RaylaunchError(message, hint="its log has the traceback; raylaunch status shows where it is"))
