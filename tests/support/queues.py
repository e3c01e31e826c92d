"""What the queue decides, job by job."""

from __future__ import annotations

from collections.abc import Iterable

from raylaunch.controller.backlog import Backlog
from raylaunch.controller.queue import Admit, Ask, Holding, Room, Wait, plan_queue


def decide(asks: Iterable[Ask], rooms: list[Room], holdings: list[Holding]) -> list[Admit | Wait]:
    """Return the decision for each of these waiting jobs, in the queue's order."""
    backlog = Backlog(asks)
    plan = plan_queue(backlog, rooms, holdings, groups=backlog.groups)
    return [plan.of(ask) for ask in backlog]
