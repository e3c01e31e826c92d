"""Whether a controller responds, and the end of one that runs and does not.

One that was stopped, or is stuck, keeps its process and its port: only a question to it shows that. Its jobs continue
without it, and the next controller reads from their own records how they ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from raylaunch.cluster.answer import ask
from raylaunch.cluster.home import ClusterPaths
from raylaunch.cluster.process import ProcessIdentity, end, is_alive
from raylaunch.cluster.record import ClusterRecord, cluster_lock, load_record

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
    """Return whether the controller at this port answers at all; what it answers does not matter."""
    return (await ask(port, PATH, token=token, limit_s=limit_s)).status != 0


async def end_hung(paths: ClusterPaths, token: str, *, lock_s: float) -> ProcessIdentity | None:
    """End the cluster's controller here if it runs and does not respond; return which process that was.

    One that has just been started is left alone.

    Raises:
        ConflictError: another raylaunch was changing the cluster for all of `lock_s` seconds.
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
    """Return for how long the controller may still be silent because it starts; 0 once it has answered."""
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
        """Ask the controller of `record` once, and return whether it counts as hung."""
        answers = await responds(record.ports["controller"], token)
        return self.judge(record.controller, answers=answers, answered_before=record.controller_answered)

    def judge(self, controller: ProcessIdentity | None, *, answers: bool, answered_before: bool = False) -> bool:
        """Take in one question's outcome, and return whether this controller counts as hung.

        Args:
            controller: which one was asked.
            answers: whether it answered.
            answered_before: whether somebody else has had an answer of it.
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
