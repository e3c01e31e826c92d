"""The queue: which jobs start now and on which node, and why the others wait. Pure functions over values.

The order is priority, then age. A job that does not fit reserves what it lacks on the node where it lacks least, so
that smaller jobs behind it cannot starve it; resources that it does not need remain available.

Jobs with equal requests form a group. Within one plan free resources only shrink and reservations only grow, so once
one job of a group waits, all behind it in the group wait for the same reason: the cost of a plan depends on the number
of groups, not of jobs. Messages are formatted only when somebody reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
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
    required_amounts,
)
from raylaunch.controller.store.record import JobRecord
from raylaunch.models.cluster import Drain, NodeView
from raylaunch.models.job_spec import Where
from raylaunch.models.states import Reason

_WAITING = {GPUS: Reason.WAITING_FOR_GPUS, CPUS: Reason.WAITING_FOR_CPUS, MEMORY: Reason.WAITING_FOR_MEMORY}
_GIB = 1024**3
_EPSILON = 1e-6
_MAX_CHECKS = 1000
_MIN_GROUPS = 50


@dataclass(frozen=True)
class Allocation:
    """Resources that an attempt holds on a node until it is proven to have exited."""

    job: str
    name: str
    node_id: str
    amounts: Amounts
    placed: bool = True
    """Whether Ray already counts them as used."""


@dataclass(frozen=True)
class NodeCapacity:
    """A node as the queue sees it.

    `ray_free` is what Ray reports as free; `outside` GPUs are used by processes that Ray does not know.
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
    """Why it gets no new attempts, as it follows its name; empty when it is not drained."""


@dataclass(frozen=True)
class Admit:
    """This job starts now, on this node."""

    job: str
    node_id: str
    hostname: str


@dataclass(frozen=True)
class Block:
    """Why all jobs of a group wait: the reason, and a function that formats the message."""

    reason: Reason
    format: Callable[[], str]

    @cached_property
    def message(self) -> str:
        """The message."""
        return self.format()


@dataclass(frozen=True)
class QueuePlan:
    """The decision for every waiting job."""

    admits: tuple[Admit, ...] = ()
    """In the queue's order."""
    blocks: Mapping[str, Block] = field(default_factory=dict)
    """By group, for groups of which a job waits."""
    rest: Block | None = None
    """For all other groups: why they were not considered. None if all were."""

    def block(self, request: ResourceRequest) -> Block | None:
        """Return why a job waits that is not among `admits`; None if it was submitted after the plan was made."""
        return self.blocks.get(request.group, self.rest)

    def of(self, request: ResourceRequest) -> Admit | WaitDecision:
        """Return the decision for one of the jobs that the plan covers."""
        for admit in self.admits:
            if admit.job == request.job:
                return admit
        block = self.block(request)
        if block is None:
            raise KeyError(request.job)
        return WaitDecision(request.job, block.reason, block.message)


def max_groups(nodes: int) -> int:
    """Return how many groups one plan considers; jobs of the groups behind them wait for their turn.

    It bounds the cost of a plan when each of ten thousand jobs has a different request, like Slurm's
    ``bf_max_job_test``.
    """
    return max(_MIN_GROUPS, _MAX_CHECKS // max(1, nodes))


def plan_queue(
    requests: Iterable[ResourceRequest],
    nodes: list[NodeCapacity],
    allocations: list[Allocation],
    *,
    groups: int,
    down: Mapping[str, float] | None = None,
) -> QueuePlan:
    """Decide for every waiting job whether and where it starts now, or what it waits for.

    Args:
        requests: the waiting jobs, in the queue's order.
        nodes: the nodes on which an attempt can start.
        allocations: what running attempts hold.
        groups: number of groups among `requests`.
        down: unavailable hosts, and since when (seconds since the epoch).
    """
    planner = _Planner(nodes, allocations, down or {})
    most = max_groups(len(nodes))
    admits: list[Admit] = []
    blocks: dict[str, Block] = {}
    for request in requests:
        if len(blocks) == groups:
            break
        if request.group in blocks:
            continue
        if len(blocks) == most:
            late = Block(Reason.WAITING_FOR_TURN, lambda: f"waits behind jobs with {most} other requests")
            return QueuePlan(tuple(admits), blocks, late)
        decision = planner.decide(request)
        if isinstance(decision, Admit):
            admits.append(decision)
        else:
            blocks[request.group] = decision
    return QueuePlan(tuple(admits), blocks)


class _Planner:
    """A plan in the making: what is free, and what the waiting jobs so far have reserved."""

    def __init__(self, nodes: list[NodeCapacity], allocations: list[Allocation], down: Mapping[str, float]) -> None:
        here: dict[str, list[Allocation]] = {node.node_id: [] for node in nodes}
        for allocation in allocations:
            here.setdefault(allocation.node_id, []).append(allocation)
        self._nodes = nodes
        self._down = down
        self._allocations = here
        self._free = {node.node_id: free_amounts(node, here[node.node_id]) for node in nodes}
        self._reserved: dict[str, dict[str, ResourceRequest]] = {node.node_id: {} for node in nodes}
        """By node and resource: the waiting job that needs most of it."""
        self._first_waiting: dict[str, ResourceRequest] = {}
        """By node: the first job that waits for it."""

    def decide(self, request: ResourceRequest) -> Admit | Block:
        """Decide for the next job in the queue."""
        able = [node for node in self._nodes if _can_ever_run(request, node)]
        taking = [node for node in able if not node.drained]
        fitting = [node for node in taking if _fits(request.needs, self._free[node.node_id])]
        allowed = [node for node in fitting if not self._delays_earlier(request, node)]
        if allowed:
            node = min(allowed, key=lambda node: _leftover(request, self._free[node.node_id]))
            self._free[node.node_id] = _minus(self._free[node.node_id], request.needs)
            held = Allocation(request.job, request.name, node.node_id, request.needs, placed=False)
            self._allocations[node.node_id] = [*self._allocations[node.node_id], held]
            return Admit(request.job, node.node_id, node.hostname)
        if fitting:
            return _wait_for_turn(fitting[0], self._first_waiting[fitting[0].node_id])
        if not able:
            return Block(Reason.WAITING_FOR_NODE, lambda: unsatisfiable_reason(request, self._nodes, self._down))
        if not taking:
            return _wait_for_drain(able)
        nearest = min(taking, key=lambda node: (_deficit(request.needs, self._free[node.node_id]), node.hostname))
        self._hold_back(request, nearest.node_id)
        return _explain(request, nearest, self._free[nearest.node_id], self._allocations[nearest.node_id])

    def _delays_earlier(self, request: ResourceRequest, node: NodeCapacity) -> bool:
        """Whether starting `request` on `node` would take what an earlier job waits for there."""
        reserved = self._reserved[node.node_id]
        free = self._free[node.node_id]
        return any(
            name in reserved and reserved[name].needs[name] > free.get(name, 0) - amount + _EPSILON
            for name, amount in request.needs.items()
            if amount > 0
        )

    def _hold_back(self, request: ResourceRequest, node_id: str) -> None:
        self._first_waiting.setdefault(node_id, request)
        reserved = self._reserved[node_id]
        for name, amount in request.needs.items():
            if name not in reserved or reserved[name].needs[name] < amount:
                reserved[name] = request


def free_amounts(node: NodeCapacity, here: Iterable[Allocation]) -> Amounts:
    """Return what raylaunch's jobs can use on `node`.

    That is its total, less what our attempts hold there (`here`), what others hold in Ray, and what processes outside
    Ray use. While Ray still counts an attempt that has exited, the result is too low rather than too high.
    """
    ours: Amounts = {}
    counted: Amounts = {}
    for allocation in here:
        for name, amount in allocation.amounts.items():
            ours[name] = ours.get(name, 0) + amount
            if allocation.placed:
                counted[name] = counted.get(name, 0) + amount
    free: Amounts = {}
    for name, total in node.total.items():
        foreign = max(0.0, total - node.ray_free.get(name, total) - counted.get(name, 0))
        outside = node.outside if name == GPUS else 0
        free[name] = max(0.0, total - ours.get(name, 0) - foreign - outside)
    return free


def unsatisfiable_reason(
    request: ResourceRequest, nodes: list[NodeCapacity], down: Mapping[str, float] | None = None
) -> str:
    """Return why no node can ever run this job as the cluster is now; empty if one can.

    Args:
        request: the job.
        nodes: the nodes on which an attempt can start.
        down: unavailable hosts, and since when (seconds since the epoch).
    """
    if any(_can_ever_run(request, node) for node in nodes):
        return ""
    if requested := _requested_but_down(request.where.hosts, nodes, down or {}):
        return requested
    if not nodes:
        return "no node of the cluster is up"
    lacking = _largest_lack(request, [node for node in nodes if not _excluded(request.where, node)])
    if lacking:
        return lacking
    return "; ".join(f"{node.hostname}: {_node_mismatch(request, node)}" for node in nodes)


def _requested_but_down(hosts: Sequence[str], nodes: list[NodeCapacity], down: Mapping[str, float]) -> str:
    """Report requested hosts none of which is up; empty if one is, or none is known."""
    up = {node.hostname for node in nodes}
    away = [host for host in hosts if host in down]
    if not away or any(host in up for host in hosts):
        return ""
    whole = "the only requested host" if len(hosts) == 1 else "one of the requested hosts"
    return "; ".join(f"{host}, {whole}, has been down since {_clock(down[host])}" for host in away)


def _clock(at: float) -> str:
    today = time.strftime("%Y-%m-%d", time.gmtime()) == time.strftime("%Y-%m-%d", time.gmtime(at))
    return time.strftime("%H:%M UTC" if today else "%Y-%m-%d %H:%M UTC", time.gmtime(at))


def _largest_lack(request: ResourceRequest, nodes: list[NodeCapacity]) -> str:
    """Report a resource of which even the largest node has too little."""
    for name, amount in request.needs.items():
        if nodes and all(node.total.get(name, 0) + _EPSILON < amount for node in nodes):
            largest = max(nodes, key=lambda node: node.total.get(name, 0))
            have = largest.total.get(name, 0)
            if not have:
                return f"needs {format_amount(name, amount)} on one node, but no node has any"
            best = f"{_number(name, have)} ({largest.hostname})"
            return f"needs {format_amount(name, amount)} on one node; the largest has {best}"
    return ""


def _can_ever_run(request: ResourceRequest, node: NodeCapacity) -> bool:
    return not _excluded(request.where, node) and _fits(request.needs, node.total)


def _node_mismatch(request: ResourceRequest, node: NodeCapacity) -> str:
    excluded = _excluded(request.where, node)
    if excluded:
        return excluded
    name, amount = next(
        (name, need) for name, need in request.needs.items() if node.total.get(name, 0) + _EPSILON < need
    )
    return f"has {format_amount(name, node.total.get(name, 0))} of {_number(name, amount)}"


def _excluded(where: Where, node: NodeCapacity) -> str:
    if where.hosts and node.hostname not in where.hosts:
        return f"is not one of the requested hosts ({', '.join(where.hosts)})"
    if where.arch and node.arch != where.arch:
        return f"is {node.arch or 'of unknown architecture'}, not {where.arch}"
    if where.gpu_type and where.gpu_type.lower() not in node.gpu_type.lower():
        return f"has {node.gpu_type or 'no GPU of a known type'}, not {where.gpu_type}"
    for key, value in where.labels.items():
        if node.labels.get(key) != value:
            return f"has no label {key}={value}"
    return ""


def _fits(amounts: Amounts, free: Amounts) -> bool:
    for name, amount in amounts.items():  # noqa: SIM110 -- all() takes twice as long, and a plan requests this often
        if free.get(name, 0) + _EPSILON < amount:
            return False
    return True


def _wait_for_turn(node: NodeCapacity, ahead: ResourceRequest) -> Block:
    def message() -> str:
        return (
            f"would fit on {node.hostname}, but {ahead.name} ({ahead.job}) is ahead of it and waits for "
            f"{_list_amounts(ahead.needs)} there"
        )

    return Block(Reason.WAITING_FOR_TURN, message)


def _wait_for_drain(able: list[NodeCapacity]) -> Block:
    def message() -> str:
        return f"could run, but {'; '.join(f'{node.hostname} {node.drained}' for node in able)}"

    return Block(Reason.WAITING_FOR_DRAIN, message)


def _explain(request: ResourceRequest, node: NodeCapacity, free: Amounts, here: Sequence[Allocation]) -> Block:
    """Explain what is missing on the node that is closest to fitting."""
    lacking = next(name for name, amount in request.needs.items() if free.get(name, 0) + _EPSILON < amount)
    outside = node.outside if lacking == GPUS else 0
    reason = _WAITING.get(lacking, Reason.WAITING_FOR_RESOURCE)
    if outside and outside >= request.needs[lacking] - free.get(lacking, 0) and not _held(here, lacking):
        reason = Reason.GPU_BUSY_OUTSIDE

    def message() -> str:
        holders = [
            f"{_number(lacking, allocation.amounts[lacking])} held by {allocation.name} ({allocation.job})"
            for allocation in here
            if allocation.amounts.get(lacking, 0) > 0
        ]
        foreign = node.total.get(lacking, 0) - free.get(lacking, 0) - _held(here, lacking) - outside
        if foreign > _EPSILON:
            holders.append(f"{_number(lacking, foreign)} held in Ray by others")
        if outside:
            users = f" ({', '.join(node.outside_users)})" if node.outside_users else ""
            holders.append(f"{outside} used by processes outside raylaunch{users}")
        text = (
            f"needs {format_amount(lacking, request.needs[lacking])} on one node; {node.hostname} has "
            f"{_number(lacking, free.get(lacking, 0))} free of {_number(lacking, node.total.get(lacking, 0))}"
        )
        return text + (": " + ", ".join(holders) if holders else "")

    return Block(reason, message)


def _held(here: Iterable[Allocation], name: str) -> float:
    return sum(allocation.amounts.get(name, 0) for allocation in here)


def _deficit(amounts: Amounts, free: Amounts) -> float:
    deficit = 0.0
    for name, amount in amounts.items():
        lack = amount - free.get(name, 0)
        if lack > 0:
            deficit += lack / amount
    return deficit


def _leftover(request: ResourceRequest, free: Amounts) -> tuple[float, float]:
    """Best fit: jobs without GPUs go to nodes with the fewest GPUs, which leaves room for large GPU jobs."""
    after = _minus(free, request.needs)
    return (after.get(GPUS, 0), -after.get(CPUS, 0))


def _minus(free: Amounts, amounts: Amounts) -> Amounts:
    return {name: have - amounts.get(name, 0) for name, have in free.items()}


def format_amount(name: str, amount: float) -> str:
    """Return an amount with its unit: ``16 GPUs``, ``1 CPU``, ``8 GiB of memory``, ``2 scratch``."""
    if name == MEMORY:
        return f"{_number(name, amount)} of memory"
    if name in {GPUS, CPUS}:
        return f"{_number(name, amount)} {name}{'' if amount == 1 else 's'}"
    return f"{_number(name, amount)} {name}"


def _list_amounts(amounts: Amounts) -> str:
    return ", ".join(format_amount(name, amount) for name, amount in amounts.items())


def _number(name: str, amount: float) -> str:
    return f"{amount / _GIB:.3g} GiB" if name == MEMORY else f"{round(amount, 4):g}"


def active_allocations(
    records: Iterable[JobRecord], *, released: AbstractSet[str], seen: Mapping[str, ObservedAttempt]
) -> list[Allocation]:
    """Return what the attempts of active jobs hold, until they are proven to have exited (`released`).

    An attempt is on the node where an agent sees it: a restarted Ray gives its node a new id. A driver (``launcher:
    ray``) requests nothing from Ray itself; its workers use what the job holds. The same amount of what Ray counts as
    used is attributed to them, so that nothing is counted twice.
    """
    return [
        Allocation(
            job=record.id,
            name=record.name,
            node_id=observed.node_id if observed is not None else attempt.node_id,
            amounts=required_amounts(record.own_spec),
            placed=observed is not None and observed.claim is not None,
        )
        for record in records
        if record.state.active
        for attempt in record.attempts[-1:]
        if attempt.id not in released
        for observed in [seen.get(attempt.id)]
    ]


def node_capacities(nodes: Iterable[NodeView]) -> list[NodeCapacity]:
    """Return the nodes that are alive and whose agent responds: an attempt can start there, unless drained."""
    return [_capacity(node) for node in nodes if node.ready]


def with_drains(nodes: Iterable[NodeView], drains: Mapping[str, Drain]) -> tuple[NodeView, ...]:
    """Return the nodes, with the drain of each drained one."""
    return tuple(node.model_copy(update={"drain": drains.get(node.hostname)}) for node in nodes)


def _capacity(node: NodeView) -> NodeCapacity:
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
