"""What the controller sees of Ray, the nodes and the attempts: filled by the link's events and by polls, read by all.

Nothing here is remembered over a restart; it is seen again.
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
    """One place for what is seen, and a bell that rings when it changes."""

    nodes: tuple[NodeView, ...] = ()
    nodes_at: float = float("-inf")
    """When they were looked at (monotonic): what others do on their GPUs and disks changes without a word."""
    down: dict[str, float] = field(default_factory=dict)
    """Hosts that were seen and on which no attempt can start now, and since when, seconds since the epoch."""
    refresh_needed: bool = False
    """Set when they are to be looked at."""
    attempts: dict[str, ObservedAttempt] = field(default_factory=dict)
    ray_jobs: dict[str, RayJob] = field(default_factory=dict)
    ray_version: str = ""
    ray_answers: bool = False
    bridge_up: bool = False
    bridge_error: str = ""
    store_problems: dict[str, str] = field(default_factory=dict)
    released: set[str] = field(default_factory=set)
    """Attempts that are proven gone from their node, while their files still travel: they hold nothing any more."""
    plan: QueuePlan | None = None
    """What the queue decided last: why each job waits is read from it."""
    paused_until: float = 0.0
    """Until then no attempt begins, on no host; seconds since the epoch. Not remembered over a restart."""
    pause_reason: str = ""
    _storage_error: tuple[str, float] = ("", 0.0)
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    _growth: dict[str, asyncio.Event] = field(default_factory=dict)

    @property
    def storage_error(self) -> str:
        """Why records could not be written a moment ago; empty when they could. What failed is tried each second."""
        message, at = self._storage_error
        return message if time.monotonic() - at < _STORAGE_ERROR_S else ""

    @storage_error.setter
    def storage_error(self, message: str) -> None:
        self._storage_error = (message, time.monotonic())

    def notify_growth(self, attempt: str) -> None:
        """Wake everybody who waits for a file of this attempt to grow."""
        growth = self._growth.pop(attempt, None)
        if growth is not None:
            growth.set()

    async def wait_growth(self, attempt: str, timeout_s: float) -> None:
        """Wait until a file of the attempt grows, or the time is over."""
        growth = self._growth.setdefault(attempt, asyncio.Event())
        await _wait(growth, timeout_s)

    def notify(self) -> None:
        """Wake everybody who waits in `changed`."""
        self._bell.set()
        self._bell = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """Wait until something changes, or the time is over."""
        await _wait(self._bell, timeout_s)

    def set_nodes(self, nodes: tuple[NodeView, ...]) -> None:
        """Take in the nodes as they are now."""
        up = {node.hostname for node in nodes if node.ready}
        known = {node.hostname for node in (*self.nodes, *nodes)} | self.down.keys()
        self.down = {host: self.down.get(host, time.time()) for host in known - up}
        self.nodes, self.nodes_at = nodes, time.monotonic()

    @property
    def nodes_age(self) -> float:
        """How many seconds ago the nodes were looked at."""
        return time.monotonic() - self.nodes_at

    async def fresh_nodes(self, *, age_s: float, timeout_s: float) -> None:
        """Have the nodes looked at, and wait for that at most `timeout_s`, unless it was less than `age_s` ago."""
        deadline = time.monotonic() + timeout_s
        if self.nodes_age < age_s:
            return
        self.refresh_needed = True
        self.notify()
        before = self.nodes_at
        while self.bridge_up and self.nodes_at == before and (left := deadline - time.monotonic()) > 0:
            await self.wait(left)

    def node(self, node_id: str) -> NodeView | None:
        """Return a node that is alive, or None."""
        return next((node for node in self.nodes if node.id == node_id and node.alive), None)

    def node_of(self, attempt: AttemptView) -> str:
        """Return the id of the node alive where the attempt is, or nothing.

        That is where it was seen last, else where it was sent; and when Ray was restarted there, the new node on the
        same machine.
        """
        seen = self.attempts.get(attempt.id)
        for node_id in (seen.node_id if seen is not None else "", attempt.node_id):
            if node_id and self.node(node_id) is not None:
                return node_id
        return next((node.id for node in self.ready_nodes() if node.hostname == attempt.node), "")

    def ready_nodes(self) -> list[NodeView]:
        """Return the nodes that are alive and whose steward answers: those on which an attempt can start."""
        return [node for node in self.nodes if node.ready]


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with anyio.move_on_after(timeout_s):  # asyncio.wait_for swallows, up to Python 3.11, a cancellation at that moment
        await event.wait()
