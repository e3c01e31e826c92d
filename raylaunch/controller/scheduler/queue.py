"""Whose turn it is, and why not yours. Pure functions over values; nothing here talks to anything.

The order is priority, then age. A job that does not fit holds back what it lacks on the node where it lacks least, so
that smaller jobs behind it cannot starve it; what it does not need goes on.

Jobs that ask for the same on the same nodes are one group. Within one plan what is free only shrinks and what is held
back only grows, so once a job of a group waits, all behind it in the group wait for the same: a plan costs as much as
there are groups, however many jobs wait in them. Sentences are made when somebody reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePath

from raylaunch.controller.ray.protocol import ObservedAttempt
from raylaunch.controller.store.backlog import (
    CPUS,
    GPUS,
    MEMORY,
    Amounts,
    ResourceRequest,
    WaitDecision,
    asked,
    needs,
)
from raylaunch.controller.store.record import JobRecord
from raylaunch.models.cluster import Drain, NodeView
from raylaunch.models.job_spec import Where
from raylaunch.models.states import Reason

_WAITING = {GPUS: Reason.WAITING_FOR_GPUS, CPUS: Reason.WAITING_FOR_CPUS, MEMORY: Reason.WAITING_FOR_MEMORY}
_GIB = 1024**3
_EPSILON = 1e-6


@dataclass(frozen=True)
class Allocation:
    """An attempt that holds something on a node until it is proven gone."""

    job: str
    name: str
    node_id: str
    amounts: Amounts
    placed: bool = True
    """Whether Ray already counts it as used."""


@dataclass(frozen=True)
class NodeCapacity:
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
class Block:
    """Why all jobs of a group wait: the reason, and the sentence once somebody wants to read it."""

    reason: Reason
    sentence: Callable[[], str]

    @cached_property
    def message(self) -> str:
        """The sentence."""
        return self.sentence()


@dataclass(frozen=True)
class QueuePlan:
    """What the queue decided for every waiting job."""

    admits: tuple[Admit, ...] = ()
    """In the queue's order."""
    blocks: Mapping[str, Block] = field(default_factory=dict)
    """By group, for those of which a job waits."""
    rest: Block | None = None
    """For all other groups: why they were not looked at. None when all were."""

    def block(self, ask: ResourceRequest) -> Block | None:
        """Return why a job waits that is not among `admits`; None when it came after the plan was made."""
        return self.blocks.get(ask.group, self.rest)

    def of(self, ask: ResourceRequest) -> Admit | WaitDecision:
        """Return what was decided for a job that the plan was made for."""
        for admit in self.admits:
            if admit.job == ask.job:
                return admit
        block = self.block(ask)
        if block is None:
            raise KeyError(ask.job)
        return WaitDecision(ask.job, block.reason, block.message)


_LOOKS = 1000
_GROUPS_AT_LEAST = 50


def most_groups(rooms: int) -> int:
    """Return how many groups one plan takes into account; the jobs of those behind them wait for their turn.

    It bounds what a plan costs where each of ten thousand jobs asks for something else, as Slurm's
    ``bf_max_job_test`` does.
    """
    return max(_GROUPS_AT_LEAST, _LOOKS // max(1, rooms))


def plan_queue(
    asks: Iterable[ResourceRequest],
    rooms: list[NodeCapacity],
    holdings: list[Allocation],
    *,
    groups: int,
    down: Mapping[str, float] | None = None,
) -> QueuePlan:
    """Decide for every waiting job whether it starts now and where, or what it waits for.

    Args:
        asks: the waiting jobs, in the queue's order.
        rooms: the nodes on which an attempt can start.
        holdings: what attempts hold.
        groups: how many groups there are among `asks`.
        down: hosts on which none can start now, and since when (seconds since the epoch).
    """
    planning = _Planning(rooms, holdings, down or {})
    most = most_groups(len(rooms))
    admits: list[Admit] = []
    blocks: dict[str, Block] = {}
    for ask in asks:
        if len(blocks) == groups:
            break
        if ask.group in blocks:
            continue
        if len(blocks) == most:
            late = Block(Reason.WAITING_FOR_TURN, lambda: f"waits behind jobs that ask for {most} other things")
            return QueuePlan(tuple(admits), blocks, late)
        decision = planning.decide(ask)
        if isinstance(decision, Admit):
            admits.append(decision)
        else:
            blocks[ask.group] = decision
    return QueuePlan(tuple(admits), blocks)


class _Planning:
    """One plan while it is made: what is free, and what the jobs so far hold back."""

    def __init__(self, rooms: list[NodeCapacity], holdings: list[Allocation], down: Mapping[str, float]) -> None:
        here: dict[str, list[Allocation]] = {room.node_id: [] for room in rooms}
        for holding in holdings:
            here.setdefault(holding.node_id, []).append(holding)
        self._rooms = rooms
        self._down = down
        self._here = here
        self._free = {room.node_id: free_in(room, here[room.node_id]) for room in rooms}
        self._kept: dict[str, dict[str, ResourceRequest]] = {room.node_id: {} for room in rooms}
        """For each node and resource: of the jobs that wait for it there, the one that needs most."""
        self._first: dict[str, ResourceRequest] = {}
        """For each node: the first job that waits for it."""

    def decide(self, ask: ResourceRequest) -> Admit | Block:
        """Decide for the next job of the queue."""
        able = [room for room in self._rooms if _able(ask, room)]
        taking = [room for room in able if not room.drained]
        fitting = [room for room in taking if _fits(ask.needs, self._free[room.node_id])]
        allowed = [room for room in fitting if not self._hurts(ask, room)]
        if allowed:
            room = min(allowed, key=lambda room: _leftover(ask, self._free[room.node_id]))
            self._free[room.node_id] = _minus(self._free[room.node_id], ask.needs)
            held = Allocation(ask.job, ask.name, room.node_id, ask.needs, placed=False)
            self._here[room.node_id] = [*self._here[room.node_id], held]
            return Admit(ask.job, room.node_id, room.hostname)
        if fitting:
            return _wait_for_turn(fitting[0], self._first[fitting[0].node_id])
        if not able:
            return Block(Reason.WAITING_FOR_NODE, lambda: why_never(ask, self._rooms, self._down))
        if not taking:
            return _wait_for_drain(able)
        nearest = min(taking, key=lambda room: (_deficit(ask.needs, self._free[room.node_id]), room.hostname))
        self._hold_back(ask, nearest.node_id)
        return _explain(ask, nearest, self._free[nearest.node_id], self._here[nearest.node_id])

    def _hurts(self, ask: ResourceRequest, room: NodeCapacity) -> bool:
        """Whether starting `ask` in `room` takes what a job ahead of it waits for there."""
        kept = self._kept[room.node_id]
        free = self._free[room.node_id]
        return any(
            name in kept and kept[name].needs[name] > free.get(name, 0) - amount + _EPSILON
            for name, amount in ask.needs.items()
            if amount > 0
        )

    def _hold_back(self, ask: ResourceRequest, node_id: str) -> None:
        self._first.setdefault(node_id, ask)
        kept = self._kept[node_id]
        for name, amount in ask.needs.items():
            if name not in kept or kept[name].needs[name] < amount:
                kept[name] = ask


def free_in(room: NodeCapacity, here: Iterable[Allocation]) -> Amounts:
    """Return what is free in `room` for us.

    That is its total, less what our attempts hold there (`here`), what others hold in Ray, and what processes outside
    Ray use. While Ray still counts an attempt that is gone, this errs on the careful side.
    """
    ours: Amounts = {}
    counted: Amounts = {}
    for holding in here:
        for name, amount in holding.amounts.items():
            ours[name] = ours.get(name, 0) + amount
            if holding.placed:
                counted[name] = counted.get(name, 0) + amount
    free: Amounts = {}
    for name, total in room.total.items():
        foreign = max(0.0, total - room.ray_free.get(name, total) - counted.get(name, 0))
        outside = room.outside if name == GPUS else 0
        free[name] = max(0.0, total - ours.get(name, 0) - foreign - outside)
    return free


def why_never(ask: ResourceRequest, rooms: list[NodeCapacity], down: Mapping[str, float] | None = None) -> str:
    """Say why no node could run this job as the cluster is, however long it waits; empty when one could.

    Args:
        ask: the job.
        rooms: the nodes on which an attempt can start.
        down: hosts on which none can start now, and since when (seconds since the epoch).
    """
    if any(_able(ask, room) for room in rooms):
        return ""
    if requested := _requested_but_down(ask.where.hosts, rooms, down or {}):
        return requested
    if not rooms:
        return "no node of the cluster is up"
    lacking = _largest_lack(ask, [room for room in rooms if not _excluded(ask.where, room)])
    if lacking:
        return lacking
    return "; ".join(f"{room.hostname}: {_why_never(ask, room)}" for room in rooms)


def _requested_but_down(hosts: Sequence[str], rooms: list[NodeCapacity], down: Mapping[str, float]) -> str:
    """The sentence about requested hosts none of which is up; empty when one is, or none is known."""
    up = {room.hostname for room in rooms}
    away = [host for host in hosts if host in down]
    if not away or any(host in up for host in hosts):
        return ""
    whole = "the only requested host" if len(hosts) == 1 else "one of the requested hosts"
    return "; ".join(f"{host}, {whole}, has been down since {_clock(down[host])}" for host in away)


def _clock(at: float) -> str:
    today = time.strftime("%Y-%m-%d", time.gmtime()) == time.strftime("%Y-%m-%d", time.gmtime(at))
    return time.strftime("%H:%M UTC" if today else "%Y-%m-%d %H:%M UTC", time.gmtime(at))


def _largest_lack(ask: ResourceRequest, rooms: list[NodeCapacity]) -> str:
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


def _able(ask: ResourceRequest, room: NodeCapacity) -> bool:
    return not _excluded(ask.where, room) and _fits(ask.needs, room.total)


def _why_never(ask: ResourceRequest, room: NodeCapacity) -> str:
    excluded = _excluded(ask.where, room)
    if excluded:
        return excluded
    name, amount = next((name, need) for name, need in ask.needs.items() if room.total.get(name, 0) + _EPSILON < need)
    return f"has {amount_text(name, room.total.get(name, 0))} of {_plain(name, amount)}"


def _excluded(where: Where, room: NodeCapacity) -> str:
    if where.hosts and room.hostname not in where.hosts:
        return f"is not one of the requested hosts ({', '.join(where.hosts)})"
    if where.arch and room.arch != where.arch:
        return f"is {room.arch or 'of unknown architecture'}, not {where.arch}"
    if where.gpu_type and where.gpu_type.lower() not in room.gpu_type.lower():
        return f"has {room.gpu_type or 'no GPU of a known type'}, not {where.gpu_type}"
    for key, value in where.labels.items():
        if room.labels.get(key) != value:
            return f"has no label {key}={value}"
    return ""


def _fits(amounts: Amounts, free: Amounts) -> bool:
    for name, amount in amounts.items():  # noqa: SIM110 -- all() takes twice as long, and a plan asks this often
        if free.get(name, 0) + _EPSILON < amount:
            return False
    return True


def _wait_for_turn(room: NodeCapacity, ahead: ResourceRequest) -> Block:
    def sentence() -> str:
        return (
            f"would fit on {room.hostname}, but {ahead.name} ({ahead.job}) is ahead of it and waits for "
            f"{_list_amounts(ahead.needs)} there"
        )

    return Block(Reason.WAITING_FOR_TURN, sentence)


def _wait_for_drain(able: list[NodeCapacity]) -> Block:
    def sentence() -> str:
        return f"could run, but {'; '.join(f'{room.hostname} {room.drained}' for room in able)}"

    return Block(Reason.WAITING_FOR_DRAIN, sentence)


def _explain(ask: ResourceRequest, room: NodeCapacity, free: Amounts, here: Sequence[Allocation]) -> Block:
    """The arithmetic of the node that is nearest to fitting."""
    lacking = next(name for name, amount in ask.needs.items() if free.get(name, 0) + _EPSILON < amount)
    outside = room.outside if lacking == GPUS else 0
    reason = _WAITING.get(lacking, Reason.WAITING_FOR_RESOURCE)
    if outside and outside >= ask.needs[lacking] - free.get(lacking, 0) and not _held(here, lacking):
        reason = Reason.GPU_BUSY_OUTSIDE

    def sentence() -> str:
        holders = [
            f"{_plain(lacking, holding.amounts[lacking])} held by {holding.name} ({holding.job})"
            for holding in here
            if holding.amounts.get(lacking, 0) > 0
        ]
        foreign = room.total.get(lacking, 0) - free.get(lacking, 0) - _held(here, lacking) - outside
        if foreign > _EPSILON:
            holders.append(f"{_plain(lacking, foreign)} held in Ray by others")
        if outside:
            users = f" ({', '.join(room.outside_users)})" if room.outside_users else ""
            holders.append(f"{outside} used by processes outside raylaunch{users}")
        message = (
            f"needs {amount_text(lacking, ask.needs[lacking])} on one node; {room.hostname} has "
            f"{_plain(lacking, free.get(lacking, 0))} free of {_plain(lacking, room.total.get(lacking, 0))}"
        )
        return message + (": " + ", ".join(holders) if holders else "")

    return Block(reason, sentence)


def _held(here: Iterable[Allocation], name: str) -> float:
    return sum(holding.amounts.get(name, 0) for holding in here)


def _deficit(amounts: Amounts, free: Amounts) -> float:
    deficit = 0.0
    for name, amount in amounts.items():
        lack = amount - free.get(name, 0)
        if lack > 0:
            deficit += lack / amount
    return deficit


def _leftover(ask: ResourceRequest, free: Amounts) -> tuple[float, float]:
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


def placed(holding: Allocation) -> Allocation:
    """Return the same holding, now counted by Ray."""
    return replace(holding, placed=True)


def holdings_of(
    records: Iterable[JobRecord], *, released: AbstractSet[str], seen: Mapping[str, ObservedAttempt]
) -> list[Allocation]:
    """Return what our attempts hold: those of active jobs, until they are proven gone (`released`).

    An attempt is where a steward sees it: a restarted Ray gives its node a new id. A driver (``launcher: ray``) asks
    for nothing itself, and its workers take what it holds when it pleases them: as much of what Ray counts as used is
    taken for theirs, so that nothing is counted twice.
    """
    return [
        Allocation(
            job=record.id,
            name=record.name,
            node_id=sight.node_id if sight is not None else attempt.node_id,
            amounts=needs(asked(record)),
            placed=sight is not None and sight.claim is not None,
        )
        for record in records
        if record.state.active
        for attempt in record.attempts[-1:]
        if attempt.id not in released
        for sight in [seen.get(attempt.id)]
    ]


def rooms_of(nodes: Iterable[NodeView]) -> list[NodeCapacity]:
    """Return the nodes that are alive and whose steward answers: on these an attempt can start, unless drained."""
    return [_room(node) for node in nodes if node.ready]


def with_drains(nodes: Iterable[NodeView], drains: Mapping[str, Drain]) -> tuple[NodeView, ...]:
    """Return the nodes, those that are drained marked so."""
    return tuple(node.model_copy(update={"drain": drains.get(node.hostname)}) for node in nodes)


def _room(node: NodeView) -> NodeCapacity:
    users = sorted({who for gpu in node.gpu for who in map(_user, gpu.processes)})
    return NodeCapacity(
        node_id=node.id,
        hostname=node.hostname,
        total={GPUS: node.gpus, CPUS: node.cpus, MEMORY: node.memory, **node.custom},
        ray_free={GPUS: node.gpus_free, CPUS: node.cpus_free, MEMORY: node.memory_free},
        outside=sum(1 for gpu in node.gpu if gpu.processes),
        outside_users=tuple(users),
        arch=node.arch,
        gpu_type=node.gpu_type,
        labels=node.labels,
        drained=str(node.drain or ""),
    )


def _user(process: str) -> str:
    """``alice:123:/usr/bin/python`` → ``alice's python``."""
    user, _, rest = process.partition(":")
    return f"{user}'s {PurePath(rest.partition(':')[2] or rest).name}"
