"""Logs of external jobs (``ray job submit``), read on the node that runs them.

The node agent reads Ray's log file on request; nothing is copied. If no agent responds, Ray's own API is used: it sends
the whole log each time, so it is polled less often.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import cast

import anyio.from_thread

from raylaunch.agent import attempt_files
from raylaunch.agent.attempt_files import Slice
from raylaunch.controller.ray.bridge import RayBridge
from raylaunch.controller.ray.jobs_api import RayJobs
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.errors import ClusterError, NotFoundError
from raylaunch.models.job import AttemptView

_AGENT_S = 10.0
_WATCH_S = 2.0
_AGENT_RETRY_S = 30.0
_RAY_POLL_S = 1.0
_RAY_PAUSE_FACTOR = 5


@dataclass
class _Watch:
    """One wait for growth, shared by all that follow the same log."""

    size: int
    grew: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0
    task: asyncio.Task[None] | None = None


class ExternalLogs:
    """Reads logs of external jobs. Use it from one event loop."""

    def __init__(self, *, bridge: RayBridge, ray: RayJobs, observed: ObservedState) -> None:
        self._bridge = bridge
        self._ray = ray
        self._observed = observed
        self._watches: dict[str, _Watch] = {}
        self._agent_failed_until: dict[str, float] = {}
        self._ray_took_s = 0.0

    async def tail_offset(self, attempt: AttemptView, lines: int) -> int:
        """Return the offset of the last `lines` lines. Raises the same as `read`."""
        node_id = self._node_of(attempt)
        piece = await self._from_agent(node_id, attempt.id, offset=0, tail=lines, limit=1)
        if piece is not None:
            return piece.offset
        _, size = await self._from_ray(node_id, attempt.id, offset=0, limit=0)
        begin = max(0, size - attempt_files.TAIL_BYTES)
        data, _ = await self._from_ray(node_id, attempt.id, offset=begin, limit=size - begin)
        return begin + _tail_in(data, lines)

    async def read(self, attempt: AttemptView, *, offset: int, limit: int, ended: bool) -> Slice:
        """Return at most `limit` bytes from `offset` on.

        Raises:
            NotFoundError: its node is not in the cluster, or with `ended` Ray's file does not exist any more.
            ClusterDownError: neither the agent nor Ray responds.
        """
        node_id = self._node_of(attempt)
        found = await self._from_agent(node_id, attempt.id, offset=offset, tail=None, limit=limit)
        if found is None:
            data, size = await self._from_ray(node_id, attempt.id, offset=offset, limit=limit)
            found = Slice(min(offset, size), data, size)
        if ended and not found.size:
            msg = f"Ray no longer has the log of {attempt.id} on {attempt.node or node_id[:8]}"
            raise NotFoundError(msg, hint="Ray keeps logs in the folder of its session, until that is deleted")
        return found

    async def grown(self, attempt: AttemptView, size: int, timeout_s: float) -> None:
        """Return when the log has more than `size` bytes, or at the timeout."""
        watch = self._watches.setdefault(attempt.id, _Watch(size))
        watch.waiting += 1
        try:
            if watch.task is None:
                watch.size = size
                watch.task = asyncio.create_task(self._watch(attempt, watch), name=f"log of {attempt.id}")
            if watch.size <= size:
                await asyncio.wait_for(watch.grew.wait(), timeout_s)
        except asyncio.TimeoutError:
            return
        finally:
            watch.waiting -= 1

    async def _watch(self, attempt: AttemptView, watch: _Watch) -> None:
        """Check for growth as long as somebody waits for it."""
        try:
            while watch.waiting:
                size = await self._size_beyond(attempt, watch.size)
                if size is None or size > watch.size:
                    watch.size = max(watch.size, size or 0)
                    watch.grew.set()
                    watch.grew = asyncio.Event()
        finally:
            del self._watches[attempt.id]
            watch.grew.set()

    async def _size_beyond(self, attempt: AttemptView, size: int) -> int | None:
        """Return the log's size once it exceeds `size`, or after a while; None if the size is unknown."""
        node_id = self._observed.node_of(attempt)
        if self._agent_responds(node_id):
            params = {"node_id": node_id, "submission": attempt.id, "size": size, "wait_s": _WATCH_S}
            try:
                return cast("int", await self._bridge.call("ray_log_grown", params, timeout_s=_AGENT_S))
            except (ClusterError, NotFoundError):
                self._agent_failed_until[node_id] = time.monotonic() + _AGENT_RETRY_S
        await asyncio.sleep(max(_RAY_POLL_S, _RAY_PAUSE_FACTOR * self._ray_took_s))
        return None

    def _node_of(self, attempt: AttemptView) -> str:
        node_id = self._observed.node_of(attempt)
        if not node_id and self._observed.bridge_up:
            where = attempt.node or f"node {attempt.node_id[:8]}"
            msg = f"the log of {attempt.id} is on {where}, which is not in the cluster now"
            raise NotFoundError(msg, hint="its last lines, if Ray kept them: raylaunch show " + attempt.id)
        return node_id or attempt.node_id

    def _agent_responds(self, node_id: str) -> bool:
        node = self._observed.node(node_id)
        shunned = self._agent_failed_until.get(node_id, 0) > time.monotonic()
        return self._observed.bridge_up and node is not None and node.steward and not shunned

    async def _from_agent(
        self, node_id: str, submission: str, *, offset: int, tail: int | None, limit: int
    ) -> Slice | None:
        """Read through the node agent; None if it does not respond."""
        if not self._agent_responds(node_id):
            return None
        params = {"node_id": node_id, "submission": submission, "offset": offset, "tail": tail, "limit": limit}
        try:
            return cast("Slice", await self._bridge.call("ray_log", params, timeout_s=_AGENT_S))
        except (ClusterError, NotFoundError):
            self._agent_failed_until[node_id] = time.monotonic() + _AGENT_RETRY_S
            return None

    async def _from_ray(self, node_id: str, submission: str, *, offset: int, limit: int) -> tuple[bytes, int]:
        began = time.monotonic()
        found = await self._ray.driver_log(submission, node_id, offset=offset, limit=limit)
        self._ray_took_s = time.monotonic() - began
        return found


class ExternalLogBlocks:
    """A log of an external job from an offset on, in blocks, for a worker thread."""

    def __init__(self, logs_of: ExternalLogs, attempt: AttemptView, offset: int) -> None:
        self._logs = logs_of
        self._attempt = attempt
        self._offset = offset

    def read(self, limit: int, /) -> bytes:
        """Return the next bytes; empty at the end."""

        async def read() -> Slice:
            return await self._logs.read(self._attempt, offset=self._offset, limit=limit, ended=False)

        found = anyio.from_thread.run(read)
        self._offset = found.next
        return found.data


def _tail_in(data: bytes, lines: int) -> int:
    """Return the offset of the last `lines` lines of `data`."""
    if lines <= 0:
        return len(data)
    position = len(data) - 1 if data.endswith(b"\n") else len(data)
    for _ in range(lines):
        position = data.rfind(b"\n", 0, position)
        if position < 0:
            return 0
    return position + 1
