"""The observed state of Ray, nodes and attempts: written from events of the bridge and from polls, read by all.

It is kept in memory only; after a restart it is observed again.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import anyio

from raylaunch.controller.ray.jobs_api import RayJob
from raylaunch.controller.ray.protocol import ObservedAttempt
from raylaunch.controller.scheduler.queue import QueuePlan
from raylaunch.models.cluster import NodeView
from raylaunch.models.job import AttemptView

_STORAGE_ERROR_S = 5.0


@dataclass
class ObservedState:
    """The observed state, with a wake-up for those who wait for a change."""

    nodes: tuple[NodeView, ...] = ()
    nodes_at: float = float("-inf")
    """When they were inspected (monotonic): other users of their GPUs and disks cause no event."""
    down: dict[str, float] = field(default_factory=dict)
    """Known hosts on which no attempt can start now, and since when, seconds since the epoch."""
    refresh_needed: bool = False
    """Set to have the nodes inspected."""
    attempts: dict[str, ObservedAttempt] = field(default_factory=dict)
    ray_jobs: dict[str, RayJob] = field(default_factory=dict)
    ray_version: str = ""
    ray_answers: bool = False
    bridge_up: bool = False
    bridge_error: str = ""
    store_problems: dict[str, str] = field(default_factory=dict)
    released: set[str] = field(default_factory=set)
    """Attempts that have provably exited while their files are still being copied: they hold no resources."""
    plan: QueuePlan | None = None
    """The latest plan of the queue, from which wait reasons are read."""
    paused_until: float = 0.0
    """No attempt starts anywhere until then; seconds since the epoch. A restart ends the pause."""
    pause_reason: str = ""
    _storage_error: tuple[str, float] = ("", 0.0)
    _wakeup: asyncio.Event = field(default_factory=asyncio.Event)
    _growth: dict[str, asyncio.Event] = field(default_factory=dict)

    @property
    def storage_error(self) -> str:
        """Why records could not be written recently; empty if they could. Failed writes are retried every second."""
        message, at = self._storage_error
        return message if time.monotonic() - at < _STORAGE_ERROR_S else ""

    @storage_error.setter
    def storage_error(self, message: str) -> None:
        self._storage_error = (message, time.monotonic())

    def notify_growth(self, attempt: str) -> None:
        """Wake all that wait for a file of this attempt to grow."""
        growth = self._growth.pop(attempt, None)
        if growth is not None:
            growth.set()

    async def wait_growth(self, attempt: str, timeout_s: float) -> None:
        """Wait until a file of the attempt grows, or until the timeout."""
        growth = self._growth.setdefault(attempt, asyncio.Event())
        await _wait(growth, timeout_s)

    def notify(self) -> None:
        """Wake all that wait in `wait`."""
        self._wakeup.set()
        self._wakeup = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """Wait until something changes, or until the timeout."""
        await _wait(self._wakeup, timeout_s)

    def set_nodes(self, nodes: tuple[NodeView, ...]) -> None:
        """Store the nodes as they are now."""
        up = {node.hostname for node in nodes if node.ready}
        known = {node.hostname for node in (*self.nodes, *nodes)} | self.down.keys()
        self.down = {host: self.down.get(host, time.time()) for host in known - up}
        self.nodes, self.nodes_at = nodes, time.monotonic()

    @property
    def nodes_age(self) -> float:
        """Seconds since the nodes were inspected."""
        return time.monotonic() - self.nodes_at

    async def fresh_nodes(self, *, age_s: float, timeout_s: float) -> None:
        """Refresh the nodes if they are older than `age_s`, and wait for that at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        if self.nodes_age < age_s:
            return
        self.refresh_needed = True
        self.notify()
        before = self.nodes_at
        while self.bridge_up and self.nodes_at == before and (left := deadline - time.monotonic()) > 0:
            await self.wait(left)

    def node(self, node_id: str) -> NodeView | None:
        """Return a node if it is alive, or None."""
        return next((node for node in self.nodes if node.id == node_id and node.alive), None)

    def node_of(self, attempt: AttemptView) -> str:
        """Return the id of the living node that has the attempt, or an empty string.

        That is where it was observed last, else where it was sent; if Ray was restarted there, the new node on the
        same machine.
        """
        seen = self.attempts.get(attempt.id)
        for node_id in (seen.node_id if seen is not None else "", attempt.node_id):
            if node_id and self.node(node_id) is not None:
                return node_id
        return next((node.id for node in self.ready_nodes() if node.hostname == attempt.node), "")

    def ready_nodes(self) -> list[NodeView]:
        """Return the nodes on which an attempt can start: they are alive and their agent responds."""
        return [node for node in self.nodes if node.ready]


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with anyio.move_on_after(timeout_s):  # asyncio.wait_for swallows, up to Python 3.11, a cancellation at that moment
        await event.wait()
