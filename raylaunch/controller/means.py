"""What driving an attempt takes: the stores, the link, Ray, what is seen; and the few things all of its steps do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from raylaunch.controller.link import Link
from raylaunch.controller.ray_jobs import RayJobs
from raylaunch.controller.records import JobRecord, Records
from raylaunch.controller.secret_store import SecretStore
from raylaunch.controller.settings import Settings
from raylaunch.controller.sight import Sight
from raylaunch.reasons import Reason
from raylaunch.state import AttemptView, Progress

STEP_S = 1.0
"""How long at most between two looks."""
NODE_LEASE_S = 60.0
"""How long an attempt whose node is gone may still turn up on another (a restarted Ray gives its node a new id)."""


@dataclass(frozen=True)
class Leavings:
    """What an attempt left in the store, as the record keeps it."""

    log_tail: tuple[str, ...]
    outputs: int
    output_bytes: int
    last_metrics: dict[str, float]
    progress: Progress | None = None
    warnings: tuple[str, ...] = ()
    """What the record leaves out."""


@dataclass(frozen=True)
class Means:
    """The parts that sending, following and finishing share."""

    settings: Settings
    records: Records
    secrets: SecretStore
    link: Link
    ray: RayJobs
    sight: Sight
    leavings: Callable[[JobRecord], Awaitable[Leavings]]

    def say(self, record: JobRecord, reason: Reason | None, message: str) -> None:
        """Set the sentence beside the state, once for each new sentence."""
        now = self.records.light(record.id)
        if now.message != message or now.reason != reason:
            self.records.update(record.id, kind="", message=message, reason=reason)

    def gone(self, record: JobRecord) -> bool:
        """Whether Ray answers, and the attempt's node is not among its nodes."""
        return self.sight.link_up and bool(self.sight.nodes) and not self.sight.node_of(latest(record))


def latest(record: JobRecord) -> AttemptView:
    """Return the attempt that is driven."""
    return record.attempts[-1]


def replaced(record: JobRecord, **fields: object) -> tuple[AttemptView, ...]:
    """Return the attempts with `fields` changed in the latest."""
    return (*record.attempts[:-1], record.attempts[-1].model_copy(update=fields))
