"""What the queue decides, job by job."""

from __future__ import annotations

from collections.abc import Iterable

from raylaunch.controller.scheduler.queue import Admit, Allocation, NodeCapacity, plan_queue
from raylaunch.controller.store.backlog import Backlog, ResourceRequest, WaitDecision


def decide(
    asks: Iterable[ResourceRequest], rooms: list[NodeCapacity], holdings: list[Allocation]
) -> list[Admit | WaitDecision]:
    """Return the decision for each of these waiting jobs, in the queue's order."""
    backlog = Backlog(asks)
    plan = plan_queue(backlog, rooms, holdings, groups=backlog.groups)
    return [plan.of(ask) for ask in backlog]
