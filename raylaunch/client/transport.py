"""HTTP to one controller: requests, streams and what outlasts its restarts. The only module that knows httpx2.

Its errors become those of raylaunch here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import TypeVar
from urllib.parse import unquote

import httpx2
from pydantic import BaseModel, TypeAdapter, ValidationError
from typing_extensions import Self

from raylaunch.cluster.types import Endpoint
from raylaunch.errors import (
    ClusterDownError,
    ClusterError,
    NotFoundError,
    RaylaunchError,
    SpecError,
    VersionError,
    from_wire,
)
from raylaunch.models.fields import whole
from raylaunch.models.job import JobPage, JobView
from raylaunch.models.safe_text import clean
from raylaunch.version import API, OTHERS_JOB, OTHERS_OWNER, __version__, is_older

_Result = TypeVar("_Result")
_Read = TypeVar("_Read")
_READS = frozenset({"GET", "HEAD"})
_MAY_BE_NEWER = frozenset({NotFoundError.code, SpecError.code})
"""Codes with which a controller refuses routes and fields that it does not know."""

Params = Mapping[str, str | int | float | bool | list[str] | None]

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0
HEALTH = "/v1/health"
_PAUSE_S = 0.5
_SILENT_S = 5.0
"""After that much silence, whether the controller responds at all is checked."""
_HEALTH_S = 5.0
_LONGEST = 200
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+]{0,30}")


class NoAnswerError(ClusterDownError):
    """No response: the connection was refused or lost, or the request timed out. Retrying may help."""


class Response:
    """A response whose body was read; `asked` is the request, for messages."""

    def __init__(self, response: httpx2.Response, asked: str) -> None:
        self.status = response.status_code
        self.body = response.content
        self._headers = response.headers
        self._asked = asked

    def header(self, name: str, default: str = "") -> str:
        """Return a header's value."""
        return str(self._headers.get(name, default))

    def number(self, name: str, default: int = 0) -> int:
        """Return the whole number in a header."""
        found = whole(self.header(name))
        return default if found is None else found

    def read(self, kind: type[_Read]) -> _Read:
        """Return the body, parsed as JSON.

        Raises:
            ClusterError: it is not a `kind`.
        """
        try:
            return TypeAdapter(kind).validate_json(self.body)
        except ValidationError as error:
            msg = f"the controller's response to {self._asked} cannot be read"
            raise ClusterError(msg, hint=f"raylaunch up starts a controller of this version ({__version__})") from error


OnProgress = Callable[[str, int, int], None]
"""Called with the name of the transfer, the bytes done, and the total bytes."""
Retry = Callable[[Callable[[], Awaitable[Response]]], Awaitable[Response]]
"""Retries a request while there is no response."""


def no_progress(_what: str, _done: int, _total: int, /) -> None:
    """Show nothing."""


async def allow_upload(_bytes: int) -> None:
    """Allow every upload."""


class ResponseStream:
    """A response whose body is still arriving."""

    def __init__(self, response: httpx2.Response, transport: Transport) -> None:
        self.status = response.status_code
        self._response = response
        self._transport = transport

    def header(self, name: str) -> str:
        """Return a header's value; empty if it is missing."""
        return str(self._response.headers.get(name, ""))

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body's bytes as they arrive."""
        with self._transport.translated(ANSWER_TIMEOUT_S):
            async for data in self._response.aiter_raw():
                yield data


class Transport:
    """A connection to the controller of one cluster. An async context manager.

    Args:
        endpoint: where the controller answers, and the token.
        cluster: its name, for messages.
        replace_hung: called if the controller accepts connections and does not respond; returns the address of its
            replacement.
        on_others_job: called with id and owner of a job that was requested by a name and is somebody else's.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        cluster: str,
        replace_hung: Callable[[], Awaitable[Endpoint]] | None = None,
        on_others_job: Callable[[str, str], None] | None = None,
    ) -> None:
        self.cluster = cluster
        self._on_others = on_others_job
        self._replace_hung = replace_hung
        self._replacing = asyncio.Lock()
        self._endpoint = endpoint
        self._http = self._opened()

    def _opened(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=self._endpoint.url,
            headers={
                "Authorization": f"Bearer {self._endpoint.token}",
                "X-Raylaunch-Version": __version__,
                "X-Raylaunch-Api": str(API),
            },
            timeout=_timeout(ANSWER_TIMEOUT_S),
            trust_env=False,  # a proxy must not see the cluster's token
            follow_redirects=False,
            verify=self._endpoint.url.startswith("https:"),  # reading all certificates takes 30 ms
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._http.aclose()

    async def switch_to(self, endpoint: Endpoint) -> None:
        """Continue with a controller at another address."""
        if (endpoint.url, endpoint.token) != (self._endpoint.url, self._endpoint.token):
            before, self._endpoint = self._http, endpoint
            self._http = self._opened()
            await before.aclose()

    async def request(  # noqa: PLR0913 -- a request has that many parts
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: BaseModel | dict[str, object] | None = None,
        content: bytes | None = None,
        wait_s: float = 0.0,
        allowed: tuple[int, ...] = (),
    ) -> Response:
        """Send one request and return the response.

        Args:
            method: GET, HEAD, POST, PUT or DELETE.
            path: below the base URL, for example ``/v1/status``.
            params: query parameters; those that are None or empty are left out.
            body: a JSON body.
            content: a raw body.
            wait_s: how long the controller may delay the response on purpose (long poll).
            allowed: statuses of 400 and above that the caller handles itself.

        Raises:
            NoAnswerError: there was no response.
            RaylaunchError: the controller's own error.
        """
        headers = {"Content-Type": "application/octet-stream"} if content is not None else {}
        if body is not None:
            content = body.model_dump_json().encode() if isinstance(body, BaseModel) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
        timeout_s = ANSWER_TIMEOUT_S + wait_s

        async def send() -> httpx2.Response:
            with self.translated(timeout_s):
                return await self._http.request(
                    method, path, params=_given(params), content=content, headers=headers, timeout=_timeout(timeout_s)
                )

        response = await self._answered(send, wait_s=wait_s, repeatable=method in _READS)
        self._check(response, allowed)
        return Response(response, f"{method} {path}")

    async def _answered(
        self, send: Callable[[], Awaitable[httpx2.Response]], *, wait_s: float, repeatable: bool
    ) -> httpx2.Response:
        """Return the response to a request. A controller that hangs is replaced; a read is then repeated."""
        asked, hung, silent_s = asyncio.ensure_future(send()), False, wait_s + _SILENT_S
        try:
            while not hung and not (await asyncio.wait({asked}, timeout=silent_s))[0]:
                silent_s = _SILENT_S
                hung = self._replace_hung is not None and not await self._responds()
            if hung:
                await self._replace_controller()
            try:
                return await asked
            except NoAnswerError:
                if not (hung and repeatable):
                    raise
            return await send()
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    async def _replace_controller(self) -> None:
        """Replace the controller, once for all waiting requests."""
        first = not self._replacing.locked()
        async with self._replacing:
            if self._replace_hung is not None and (first or not await self._responds()):
                await self.switch_to(await self._replace_hung())

    async def _responds(self) -> bool:
        """Return whether the controller does not hang; one that refuses the connection does not."""
        try:
            async with self._opened() as http:
                await http.get(HEALTH, timeout=_timeout(_HEALTH_S))
        except httpx2.TimeoutException:
            return False
        except httpx2.TransportError:
            return True
        return True

    async def read(  # noqa: PLR0913 -- as above
        self,
        kind: type[_Read],
        method: str,
        path: str,
        *,
        params: Params | None = None,
        wait_s: float = 0.0,
        body: BaseModel | dict[str, object] | None = None,
    ) -> _Read:
        """Send one request and return the response as a `kind`. Raises as `request`."""
        return (await self.request(method, path, params=params, body=body, wait_s=wait_s)).read(kind)

    @contextlib.asynccontextmanager
    async def stream(
        self,
        path: str,
        *,
        params: Params | None = None,
        headers: Mapping[str, str] | None = None,
        allowed: tuple[int, ...] = (),
    ) -> AsyncIterator[ResponseStream]:
        """GET a body that may be large. `allowed` and errors as for `request`."""

        async def send() -> httpx2.Response:
            with self.translated(ANSWER_TIMEOUT_S):
                asked = self._http.build_request(
                    "GET", path, params=_given(params), headers={"Accept-Encoding": "identity"}
                )
                asked.headers.update(headers or {})
                return await self._http.send(asked, stream=True)

        response = await self._answered(send, wait_s=0.0, repeatable=True)
        try:
            if response.status_code >= httpx2.codes.BAD_REQUEST:
                with self.translated(ANSWER_TIMEOUT_S):
                    await response.aread()
            self._check(response, allowed)
            yield ResponseStream(response, self)
        finally:
            await response.aclose()

    @contextlib.contextmanager
    def translated(self, timeout_s: float) -> Iterator[None]:
        """Turn httpx2's transport errors into `NoAnswerError`."""
        where = f"cluster {self.cluster!r}"
        hint = "raylaunch up starts what is missing; raylaunch status shows what is running"
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            msg = f"{where} does not answer at {self._endpoint.url}"
            raise NoAnswerError(msg, hint=hint) from None
        except httpx2.TimeoutException:
            msg = f"{where} did not answer within {timeout_s:g} s at {self._endpoint.url}"
            raise NoAnswerError(msg, hint=hint) from None
        except httpx2.TransportError as error:
            msg = f"the connection to {where} at {self._endpoint.url} was lost ({type(error).__name__})"
            raise NoAnswerError(msg, hint=hint) from None

    def _check(self, response: httpx2.Response, allowed: tuple[int, ...]) -> None:
        self._check_version(response)
        if response.status_code < httpx2.codes.BAD_REQUEST or response.status_code in allowed:
            if self._on_others and OTHERS_JOB in response.headers:
                job, owner = (_unquoted(response.headers.get(name, "")) for name in (OTHERS_JOB, OTHERS_OWNER))
                self._on_others(job, owner)
            return
        raise _error_in(response, self.cluster)

    def _check_version(self, response: httpx2.Response) -> None:
        theirs = response.headers.get("X-Raylaunch-Api")
        version = response.headers.get("X-Raylaunch-Version", "")
        version = version if _VERSION.fullmatch(version) else "of an unknown version"
        if theirs is None:
            msg = f"the server at {self._endpoint.url} is not the controller of a raylaunch cluster"
            raise ClusterError(msg, hint="raylaunch status shows where the controller is; raylaunch up starts it")
        if theirs == str(API):
            return
        newer = (whole(theirs) or 0) > API
        theirs = "another" if whole(theirs) is None else theirs
        hint = (
            f"install the controller's version here: pip install raylaunch=={version}"
            if newer
            else "raylaunch up starts a controller of this version; running jobs continue"
        )
        msg = f"this is raylaunch {__version__}, and the controller of cluster {self.cluster!r} is raylaunch {version}"
        msg += f": their protocols differ ({API} here, {theirs} there)"
        raise VersionError(msg, hint=hint)


class Reconnect:
    """Retries calls while the controller is down: it restarts in a few seconds, and jobs continue meanwhile.

    Args:
        transport: the connection; it is moved when the controller answers elsewhere afterwards.
        limit_s: for how long a call is retried.
        on_notice: called once when the connection is lost, and once when it is back, for all waiting calls together.
        restart: called between the tries; returns where to go on.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        limit_s: float,
        on_notice: Callable[[str], None],
        restart: Callable[[], Awaitable[Endpoint]] | None,
    ) -> None:
        self._transport = transport
        self._limit_s = limit_s
        self._notice = on_notice
        self._restart = restart
        self._restarting = asyncio.Lock()
        self._lost = False

    async def call(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """Retry a call that may be repeated until there is a response. Raises its last error after `limit_s`."""
        deadline = 0.0
        while True:
            try:
                result = await call()
            except NoAnswerError as error:  # noqa: PERF203 -- each turn is a request
                now = time.monotonic()
                deadline = deadline or now + self._limit_s
                if now >= deadline:
                    raise
                self._report(error.message, lost=True)
                await asyncio.sleep(_PAUSE_S)
                await self._restart_controller()
            else:
                self._report(f"cluster {self._transport.cluster!r} is responding again", lost=False)
                return result

    def _report(self, sentence: str, *, lost: bool) -> None:
        if lost != self._lost:
            self._lost = lost
            self._notice(f"{sentence}; retrying for {self._limit_s:g} s" if lost else sentence)

    async def _restart_controller(self) -> None:
        if self._restart:
            async with self._restarting:
                await self._transport.switch_to(await self._restart())


def _timeout(answer_s: float) -> httpx2.Timeout:
    return httpx2.Timeout(answer_s, connect=CONNECT_TIMEOUT_S)


def _given(params: Params | None) -> dict[str, str | int | float | bool | list[str]]:
    return {name: value for name, value in (params or {}).items() if value is not None and value not in ("", [])}


def _unquoted(header: str) -> str:
    return clean(unquote(header)[:_LONGEST], colour=False)


def _error_in(response: httpx2.Response, cluster: str) -> RaylaunchError:
    """Return the error that the controller raised; for another body, an error with the status."""
    asked = f"{response.request.method} {response.request.url.path}"
    try:
        error = json.loads(response.content)["error"]
        message, hint = (clean(str(error.get(key, "")), colour=False) for key in ("message", "hint"))
        code = str(error["code"])
        older = _older_controller_hint(response) if code in _MAY_BE_NEWER else ""
        return from_wire(code, message, "; ".join(filter(None, (older, hint))))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        log = "see the controller's log: raylaunch status shows its path"
        return RaylaunchError(f"cluster {cluster!r} answered {response.status_code} to {asked}", hint=log)


def _older_controller_hint(response: httpx2.Response) -> str:
    """Return a hint for a controller that may be too old for the request; empty if it is not older."""
    version = clean(response.headers.get("X-Raylaunch-Version", ""), colour=False)
    if not version or not is_older(version):
        return ""
    return f"its controller is raylaunch {version}, and this is {__version__}: raylaunch up replaces it; jobs continue"


def page_from(body: bytes) -> JobPage:
    """Return the page in a response; jobs that cannot be read are named in `JobPage.unreadable`.

    Raises:
        ClusterError: it is not a page.
    """
    try:
        return JobPage.model_validate_json(body)
    except ValidationError:
        return _readable_jobs(body)


def _readable_jobs(body: bytes) -> JobPage:
    """Read the page job by job: one may come from a newer controller, or be invalid."""
    jobs: list[JobView] = []
    unreadable: list[str] = []
    try:
        page = json.loads(body)
        for job in page["jobs"]:
            try:
                jobs.append(JobView.model_validate(job))
            except ValidationError:  # noqa: PERF203 -- each is one job
                unreadable.append(str(job.get("id", "?")))
        rest = {**page, "jobs": (), "unreadable": (*page.get("unreadable", ()), *unreadable)}
        return JobPage.model_validate(rest).model_copy(update={"jobs": tuple(jobs)})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = "the controller's response is not a page of jobs"
        raise ClusterError(msg, hint=f"raylaunch up starts a controller of this version ({__version__})") from error
