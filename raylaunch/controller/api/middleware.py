"""The outermost middleware: authentication, protocol version, audit log. Nothing is served without a token."""

from __future__ import annotations

import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raylaunch.controller.api.dependencies import JOIN_PATH
from raylaunch.controller.api.responses import VERSION_HEADERS, error_response
from raylaunch.controller.store.access import Caller, Invitations, TokenStore
from raylaunch.controller.store.audit import AuditLog
from raylaunch.errors import AccessError, RaylaunchError, VersionError
from raylaunch.models.fields import whole
from raylaunch.version import API, __version__

_READS = frozenset({"GET", "HEAD"})
_UNAUTHORIZED = 401
_REJECTED = frozenset({401, 403})
_NO_ANSWER = 500
_UNAUTHORIZED_LOG_S = 10.0
_MAX_VERB_CHARS = 200


class AuthMiddleware:
    """ASGI middleware, outermost. Puts the `Caller` into ``request.state.caller``."""

    def __init__(self, app: ASGIApp, *, tokens: TokenStore, invitations: Invitations, audit: AuditLog) -> None:
        self._app = app
        self._tokens = tokens
        self._invitations = invitations
        self._audit = audit
        self._unauthorized_count = 0
        self._unauthorized_at = -_UNAUTHORIZED_LOG_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or respond why it is refused."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        caller = self._caller(headers, scope["path"])
        if caller is None:
            self._audit_unauthorized(scope)
            await _unauthorized(headers)(scope, receive, send)
            return
        problem = _problem(headers)
        if problem is not None:
            self._audit.write(person=caller.person, verb=_request_line(scope), job="", status=problem.status)
            await error_response(problem, headers={"Connection": "close"})(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._pass_on(scope, receive, send, caller)

    def _caller(self, headers: Headers, path: str) -> Caller | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        if path == JOIN_PATH:
            return self._invitations.invited(token)
        return self._tokens.caller_of(token.strip())

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        answered, whole = False, False

        async def receive_until_whole() -> Message:
            nonlocal whole
            message = await receive()
            whole = whole or message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                if not whole:  # otherwise the server would wait for the rest of the body
                    MutableHeaders(scope=message)["Connection"] = "close"
                self._audit_request(scope, caller, message["status"])  # before the client can act on the response
                MutableHeaders(scope=message).update({**VERSION_HEADERS, **scope["state"].get("headers", {})})
            await send(message)

        try:
            await self._app(scope, receive_until_whole, send_with_headers)
        finally:
            if not answered:
                self._audit_request(scope, caller, _NO_ANSWER)

    def _audit_request(self, scope: Scope, caller: Caller, status: int) -> None:
        read = scope["method"] in _READS and status not in _REJECTED
        if not scope["state"].get("audited", not read):
            return
        verb = getattr(scope.get("route"), "name", "") or _request_line(scope)
        job = scope["state"].get("about") or scope.get("path_params", {}).get("ref", "")
        self._audit.write(person=caller.person, verb=verb, job=job, status=status)

    def _audit_unauthorized(self, scope: Scope) -> None:
        """Log a request without a valid token; of many, one line from time to time with their number."""
        self._unauthorized_count += 1
        now = time.monotonic()
        if now - self._unauthorized_at < _UNAUTHORIZED_LOG_S:
            return
        times = f" ({self._unauthorized_count} requests)" if self._unauthorized_count > 1 else ""
        self._audit.write(person="", verb=f"{_request_line(scope)}{times}", job="", status=_UNAUTHORIZED)
        self._unauthorized_count, self._unauthorized_at = 0, now


def _request_line(scope: Scope) -> str:
    return f"{scope['method']} {scope['path']}"[:_MAX_VERB_CHARS]


def _unauthorized(headers: Headers) -> ASGIApp:
    sent = "authorization" in headers
    message = "the token is not valid for this cluster" if sent else "the request has no token"
    hint = "send 'Authorization: Bearer TOKEN'; raylaunch's own commands take it from the cluster's folder"
    error = AccessError(message, hint=hint)
    return error_response(error, status=_UNAUTHORIZED, headers={"WWW-Authenticate": "Bearer", "Connection": "close"})


def _problem(headers: Headers) -> RaylaunchError | None:
    theirs = headers.get("x-raylaunch-api", str(API))
    if theirs != str(API):
        version = headers.get("x-raylaunch-version", "of unknown version")
        msg = f"the client is raylaunch {version} and the controller {__version__}: they do not speak the same protocol"
        newer = (whole(theirs) or 0) > API
        older_hint = f"install the controller's version on the client: pip install raylaunch=={__version__}"
        newer_hint = "raylaunch up starts a controller of the client's version; running jobs continue"
        return VersionError(f"{msg} ({theirs} there, {API} here)", hint=newer_hint if newer else older_hint)
    return None
