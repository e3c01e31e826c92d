"""Records and nodes → what the queue computes with. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import PurePath

from raylaunch.cluster_state import Drain, NodeView
from raylaunch.controller.link import AttemptSeen
from raylaunch.controller.queue import CPUS, GPUS, MEMORY, Ask, Holding, Room, needs
from raylaunch.controller.record import JobRecord
from raylaunch.spec import JobSpec


def ask_of(record: JobRecord) -> Ask:
    """Return what a waiting job asks for."""
    return ask_for(asked(record), job=record.id, since=record.created_at)


def ask_for(spec: JobSpec, *, job: str = "", since: float = 0.0) -> Ask:
    """Return what a spec asks for."""
    return Ask(
        job=job,
        name=spec.display_name,
        since=since,
        needs=needs(spec),
        where=spec.where,
        priority=spec.priority,
    )


def asked(record: JobRecord) -> JobSpec:
    """Return the spec of a job of ours; only foreign jobs have none, and they are never queued or driven."""
    if record.spec is None:
        msg = f"{record.id} has no spec"
        raise ValueError(msg)
    return record.spec


def holdings_of(
    records: Iterable[JobRecord], *, released: AbstractSet[str], seen: Mapping[str, AttemptSeen]
) -> list[Holding]:
    """Return what our attempts hold: those of active jobs, until they are proven gone (`released`).

    An attempt is where a steward sees it: a restarted Ray gives its node a new id. A driver (``launcher: ray``) asks
    for nothing itself, and its workers take what it holds when it pleases them: as much of what Ray counts as used is
    taken for theirs, so that nothing is counted twice.
    """
    return [
        Holding(
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


def rooms_of(nodes: Iterable[NodeView]) -> list[Room]:
    """Return the nodes that are alive and whose steward answers: on these an attempt can start, unless drained."""
    return [_room(node) for node in nodes if node.ready]


def with_drains(nodes: Iterable[NodeView], drains: Mapping[str, Drain]) -> tuple[NodeView, ...]:
    """Return the nodes, those that are drained marked so."""
    return tuple(node.model_copy(update={"drain": drains.get(node.hostname)}) for node in nodes)


def _room(node: NodeView) -> Room:
    users = sorted({who for gpu in node.gpu for who in map(_user, gpu.processes)})
    return Room(
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
