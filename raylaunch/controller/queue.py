"""Whose turn it is, and why not yours. Pure functions over values; nothing here talks to anything.

The order is priority, then age. A job that does not fit holds back what it lacks on the node where it lacks least, so
that smaller jobs behind it cannot starve it; what it does not need goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raylaunch.reasons import Reason
from raylaunch.spec import JobSpec, Where

GPUS = "GPU"
CPUS = "CPU"
MEMORY = "memory"

_WAITING = {GPUS: Reason.WAITING_FOR_GPUS, CPUS: Reason.WAITING_FOR_CPUS, MEMORY: Reason.WAITING_FOR_MEMORY}
_GIB = 1024**3
_EPSILON = 1e-6

Amounts = dict[str, float]
"""Resource name → amount: `GPUS`, `CPUS`, `MEMORY` (bytes), and custom resources by their own names."""


def needs(spec: JobSpec) -> Amounts:
    """Return what one attempt of `spec` holds on its node; nothing that is zero."""
    resources = spec.resources
    amounts: Amounts = {GPUS: resources.gpus, CPUS: resources.effective_cpus, MEMORY: resources.memory}
    return {name: amount for name, amount in {**amounts, **resources.custom}.items() if amount > 0}


@dataclass(frozen=True)
class Ask:
    """A job that waits."""

    job: str
    name: str
    since: float
    needs: Amounts
    where: Where = field(default_factory=Where)
    priority: int = 0


@dataclass(frozen=True)
class Holding:
    """An attempt that holds something on a node until it is proven gone."""

    job: str
    name: str
    node_id: str
    amounts: Amounts
    placed: bool = True
    """Whether Ray already counts it as used."""


@dataclass(frozen=True)
class Room:
    """A node as the queue sees it.

    `ray_free` is what Ray says is free; `outside` GPUs are used by processes that Ray does not know.
    """

    node_id: str
    hostname: str
    total: Amounts
    ray_free: Amounts
    outside: int = 0
    outside_users: tuple[str, ...] = ()
    arch: str = ""
    gpu_type: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    drained: str = ""
    """Why it gets no new attempts, as it follows its name; empty when it gets them."""


@dataclass(frozen=True)
class Admit:
    """This job starts now, on this node."""

    job: str
    node_id: str
    hostname: str


@dataclass(frozen=True)
class Wait:
    """This job waits, and why."""

    job: str
    reason: Reason
    message: str


def plan_queue(asks: list[Ask], rooms: list[Room], holdings: list[Holding]) -> list[Admit | Wait]:
    """Decide for every waiting job whether it starts now and where, or what it waits for; in the queue's order."""
    free = {room.node_id: free_in(room, holdings) for room in rooms}
    held = list(holdings)
    blocked: list[tuple[Ask, Room]] = []
    decisions: list[Admit | Wait] = []
    for ask in sorted(asks, key=lambda ask: (-ask.priority, ask.since, ask.job)):
        able = [room for room in rooms if _why_never(ask, room) is None]
        taking = [room for room in able if not room.drained]
        fitting = [room for room in taking if _fits(ask.needs, free[room.node_id])]
        allowed = [room for room in fitting if not _hurts(ask, room, free[room.node_id], blocked)]
        if allowed:
            room = min(allowed, key=lambda room: _leftover(ask, free[room.node_id]))
            free[room.node_id] = _minus(free[room.node_id], ask.needs)
            held.append(Holding(ask.job, ask.name, room.node_id, ask.needs, placed=False))
            decisions.append(Admit(ask.job, room.node_id, room.hostname))
        elif fitting:
            decisions.append(_wait_for_turn(ask, fitting[0], blocked))
        elif not able:
            decisions.append(Wait(ask.job, Reason.WAITING_FOR_NODE, why_never(ask, rooms)))
        elif not taking:
            decisions.append(_wait_for_drain(ask, able))
        else:
            nearest = min(taking, key=lambda room: (_deficit(ask.needs, free[room.node_id]), room.hostname))
            blocked.append((ask, nearest))
            decisions.append(_explain(ask, nearest, free[nearest.node_id], held))
    return decisions


def free_in(room: Room, holdings: list[Holding]) -> Amounts:
    """Return what is free in `room` for us.

    That is its total, less what our attempts hold, what others hold in Ray, and what processes outside Ray use. While
    Ray still counts an attempt that is gone, this errs on the careful side.
    """
    here = [holding for holding in holdings if holding.node_id == room.node_id]
    free: Amounts = {}
    for name, total in room.total.items():
        ours = sum(holding.amounts.get(name, 0) for holding in here)
        counted = sum(holding.amounts.get(name, 0) for holding in here if holding.placed)
        foreign = max(0.0, total - room.ray_free.get(name, total) - counted)
        outside = room.outside if name == GPUS else 0
        free[name] = max(0.0, total - ours - foreign - outside)
    return free


def why_never(ask: Ask, rooms: list[Room]) -> str:
    """Say why no node could ever run this job, however long it waits; empty when one could."""
    if not rooms:
        return "no node of the cluster is up"
    reasons = [(room, _why_never(ask, room)) for room in rooms]
    if any(reason is None for _, reason in reasons):
        return ""
    lacking = _largest_lack(ask, [room for room in rooms if not _excluded(ask.where, room)])
    if lacking:
        return lacking
    return "; ".join(f"{room.hostname}: {reason}" for room, reason in reasons)


def _largest_lack(ask: Ask, rooms: list[Room]) -> str:
    """The sentence about the one resource of which even the largest node has too little."""
    for name, amount in ask.needs.items():
        if rooms and all(room.total.get(name, 0) + _EPSILON < amount for room in rooms):
            largest = max(rooms, key=lambda room: room.total.get(name, 0))
            have = largest.total.get(name, 0)
            if not have:
                return f"asks {amount_text(name, amount)} on one node; no node has any"
            best = f"{_plain(name, have)} ({largest.hostname})"
            return f"asks {amount_text(name, amount)} on one node; the largest has {best}"
    return ""


def _why_never(ask: Ask, room: Room) -> str | None:
    excluded = _excluded(ask.where, room)
    if excluded:
        return excluded
    for name, amount in ask.needs.items():
        if room.total.get(name, 0) + _EPSILON < amount:
            return f"has {amount_text(name, room.total.get(name, 0))} of {_plain(name, amount)}"
    return None


def _excluded(where: Where, room: Room) -> str:
    if where.hosts and room.hostname not in where.hosts:
        return f"is not one of the hosts asked for ({', '.join(where.hosts)})"
    if where.arch and room.arch != where.arch:
        return f"is {room.arch or 'of unknown architecture'}, not {where.arch}"
    if where.gpu_type and where.gpu_type.lower() not in room.gpu_type.lower():
        return f"has {room.gpu_type or 'no GPU of a known type'}, not {where.gpu_type}"
    for key, value in where.labels.items():
        if room.labels.get(key) != value:
            return f"has no label {key}={value}"
    return ""


def _fits(amounts: Amounts, free: Amounts) -> bool:
    return all(free.get(name, 0) + _EPSILON >= amount for name, amount in amounts.items())


def _hurts(ask: Ask, room: Room, free: Amounts, blocked: list[tuple[Ask, Room]]) -> bool:
    """Whether starting `ask` in `room` takes what a job ahead of it waits for there."""
    after = _minus(free, ask.needs)
    return any(
        where.node_id == room.node_id and amount > after.get(name, 0) + _EPSILON and ask.needs.get(name, 0) > 0
        for first, where in blocked
        for name, amount in first.needs.items()
    )


def _wait_for_turn(ask: Ask, room: Room, blocked: list[tuple[Ask, Room]]) -> Wait:
    ahead = next(first for first, where in blocked if where.node_id == room.node_id)
    message = (
        f"would fit on {room.hostname}, but {ahead.name} ({ahead.job}) is ahead of it and waits for "
        f"{_list_amounts(ahead.needs)} there"
    )
    return Wait(ask.job, Reason.WAITING_FOR_TURN, message)


def _wait_for_drain(ask: Ask, able: list[Room]) -> Wait:
    drained = "; ".join(f"{room.hostname} {room.drained}" for room in able)
    return Wait(ask.job, Reason.WAITING_FOR_DRAIN, f"could run, but {drained}")


def _explain(ask: Ask, room: Room, free: Amounts, held: list[Holding]) -> Wait:
    """The arithmetic of the node that is nearest to fitting."""
    lacking = next(name for name, amount in ask.needs.items() if free.get(name, 0) + _EPSILON < amount)
    holders = [
        f"{_plain(lacking, holding.amounts[lacking])} held by {holding.name} ({holding.job})"
        for holding in held
        if holding.node_id == room.node_id and holding.amounts.get(lacking, 0) > 0
    ]
    ours = sum(holding.amounts.get(lacking, 0) for holding in held if holding.node_id == room.node_id)
    outside = room.outside if lacking == GPUS else 0
    foreign = room.total.get(lacking, 0) - free.get(lacking, 0) - ours - outside
    if foreign > _EPSILON:
        holders.append(f"{_plain(lacking, foreign)} held in Ray by others")
    if outside:
        users = f" ({', '.join(room.outside_users)})" if room.outside_users else ""
        holders.append(f"{outside} used by processes outside raylaunch{users}")
    message = (
        f"needs {amount_text(lacking, ask.needs[lacking])} on one node; {room.hostname} has "
        f"{_plain(lacking, free.get(lacking, 0))} free of {_plain(lacking, room.total.get(lacking, 0))}"
    )
    if holders:
        message += ": " + ", ".join(holders)
    only_outside = bool(outside) and outside >= ask.needs[lacking] - free.get(lacking, 0) and not ours
    reason = Reason.GPU_BUSY_OUTSIDE if only_outside else _WAITING.get(lacking, Reason.WAITING_FOR_RESOURCE)
    return Wait(ask.job, reason, message)


def _deficit(amounts: Amounts, free: Amounts) -> float:
    return sum(max(0.0, amount - free.get(name, 0)) / amount for name, amount in amounts.items())


def _leftover(ask: Ask, free: Amounts) -> tuple[float, float]:
    """Best fit: jobs without GPUs go where fewest GPUs are, so that large GPU jobs keep their node."""
    after = _minus(free, ask.needs)
    return (after.get(GPUS, 0), -after.get(CPUS, 0))


def _minus(free: Amounts, amounts: Amounts) -> Amounts:
    return {name: have - amounts.get(name, 0) for name, have in free.items()}


def amount_text(name: str, amount: float) -> str:
    """Return an amount with its unit, as people say it: ``16 GPUs``, ``1 CPU``, ``8 GiB of memory``, ``2 scratch``."""
    if name == MEMORY:
        return f"{_plain(name, amount)} of memory"
    if name in {GPUS, CPUS}:
        return f"{_plain(name, amount)} {name}{'' if amount == 1 else 's'}"
    return f"{_plain(name, amount)} {name}"


def _list_amounts(amounts: Amounts) -> str:
    return ", ".join(amount_text(name, amount) for name, amount in amounts.items())


def _plain(name: str, amount: float) -> str:
    return f"{amount / _GIB:.3g} GiB" if name == MEMORY else f"{round(amount, 4):g}"


def placed(holding: Holding) -> Holding:
    """Return the same holding, now counted by Ray."""
    return replace(holding, placed=True)
