"""Whether a controller responds, and ending one that hangs.

A controller that is stopped or stuck keeps its process and its port: only a request shows that. Its jobs continue
without it, and the next controller reads from their own records how they ended.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio.to_thread

from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.processes import ProcessIdentity, end, is_alive
from raylaunch.cluster.record import ClusterRecord, cluster_lock, load_record
from raylaunch.paths import ClusterPaths
from raylaunch.version import __version__


@dataclass(frozen=True)
class HttpAnswer:
    """An HTTP response. `status` is 0 if there was none, and `why` is the reason."""

    status: int
    body: bytes = b""
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is a 200."""
        return self.status == http.client.OK

    def json(self) -> object:
        """Return the body's JSON, or None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


async def http_request(  # noqa: PLR0913 -- keyword arguments
    port: int,
    path: str,
    *,
    token: str,
    host: str = LOOPBACK,
    limit_s: float = 5,
    method: str = "GET",
    body: bytes | None = None,
    secure: bool = False,
) -> HttpAnswer:
    """Request `path` at `port`, with a bearer token unless empty; a broken connection is an `HttpAnswer` too.

    With `secure`, over https, with a certificate that this machine can verify.
    """
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection

    def get() -> HttpAnswer:
        connection = kind(host, port, timeout=limit_s)
        try:
            headers = {"X-Raylaunch-Version": __version__} | ({"Authorization": f"Bearer {token}"} if token else {})
            if body is not None:
                headers["Content-Type"] = "application/json"
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            return HttpAnswer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            return HttpAnswer(0, why=str(error) or type(error).__name__)
        finally:
            connection.close()

    return await anyio.to_thread.run_sync(get)


PATH = "/v1/health"
START_S = 30.0
"""How long a controller may be silent after its start: it may have a large store to read."""

_ANSWER_S = 5.0
_SURE_S = 2.0
_GRACE_S = 1.0
_SILENT_S, _MOST_SILENT_S = 12.0, 120.0
_STEADY_S = 600.0
_FAILURES = 2


async def responds(port: int, token: str, *, limit_s: float = _ANSWER_S) -> bool:
    """Return whether the controller at this port answers at all, with any status."""
    return (await http_request(port, PATH, token=token, limit_s=limit_s)).status != 0


async def end_hung(paths: ClusterPaths, token: str, *, lock_s: float) -> ProcessIdentity | None:
    """End the cluster's controller here if it runs and does not respond; return which process that was.

    One that is still starting stays.

    Raises:
        ConflictError: another raylaunch command was changing the cluster for all of `lock_s` seconds.
    """
    async with cluster_lock(paths, limit_s=lock_s):
        record = load_record(paths)
        if record is None or record.controller is None or not is_alive(record.controller):
            return None
        if start_s_left(record) > 0:
            return None
        if await responds(record.ports["controller"], token, limit_s=_SURE_S):
            return None
        await end([record.controller], grace_s=_GRACE_S)
        return record.controller


def start_s_left(record: ClusterRecord) -> float:
    """Return for how long the controller may still be silent because it is starting; 0 once it has answered."""
    if record.controller is None or record.controller_answered:
        return 0.0
    return max(0.0, START_S - (time.time() - record.controller.started_at))


class HealthWatch:
    """Decides when a controller has been silent for too long. Each replacement allows the next one more silence.

    Args:
        clock: seconds, of a clock that only moves forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._watched: ProcessIdentity | None = None
        self._answered = False
        self._since = 0.0
        """Since when there has been no answer."""
        self._steady_since: float | None = None
        self._failures = 0
        self._replaced = 0

    async def is_hung(self, record: ClusterRecord, token: str) -> bool:
        """Query the controller of `record` once, and return whether it counts as hung."""
        answers = await responds(record.ports["controller"], token)
        return self.judge(record.controller, answers=answers, answered_before=record.controller_answered)

    def judge(self, controller: ProcessIdentity | None, *, answers: bool, answered_before: bool = False) -> bool:
        """Process the outcome of one query, and return whether this controller counts as hung.

        Args:
            controller: the one that was queried.
            answers: whether it answered.
            answered_before: whether it has answered another process.
        """
        now = self._clock()
        if controller != self._watched:
            self._watched, self._since, self._failures = controller, now, 0
            self._answered, self._steady_since = False, None
        if answers:
            self._since, self._answered, self._failures = now, True, 0
            self._steady_since = self._steady_since or now
            if now - self._steady_since > _STEADY_S:
                self._replaced = 0
            return False
        self._answered = self._answered or answered_before
        self._failures += 1
        return self._failures >= _FAILURES and now - self._since >= self._allowed_s

    def note_replaced(self) -> None:
        """Count a replacement."""
        self._replaced += 1

    @property
    def silent_s(self) -> float:
        """For how long there has been no answer."""
        return self._clock() - self._since

    @property
    def _allowed_s(self) -> float:
        allowed = min(_SILENT_S * 2.0**self._replaced, _MOST_SILENT_S)
        return allowed if self._answered else max(allowed, START_S)
