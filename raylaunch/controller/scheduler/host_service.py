"""What a person's request about hosts becomes: drain one, or all for a while; or let them take jobs again."""

from __future__ import annotations

import time

from raylaunch.contract import StopWish
from raylaunch.controller.scheduler.attempt_context import latest
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.store.audit import DrainStore
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.record import JobRecord
from raylaunch.errors import ConflictError, NotFoundError
from raylaunch.models.cluster import Drain, HostJobs, NodeView, Quiet
from raylaunch.models.states import Reason


class HostService:
    """Verbs about hosts. Each answers at once; the lifecycle carries on from the records."""

    def __init__(self, *, records: Records, drains: DrainStore, observed: ObservedState) -> None:
        self._records = records
        self._drains = drains
        self._observed = observed

    def jobs(self, host: str) -> HostJobs:
        """Say what runs on a host, and whether it is drained.

        Raises:
            NotFoundError: the cluster has no such host.
        """
        self._check_known(host)
        return self._seen(host)

    def drain(self, host: str, *, until: float | None, stop: bool, person: str) -> HostJobs:
        """Let no attempt begin on a host; with `stop`, those that run there are stopped and queued again.

        Args:
            host: its name.
            until: when it takes jobs again by itself, seconds since the epoch; None for never.
            stop: whether what runs there is stopped, each job with its own grace.
            person: who asks.

        Raises:
            NotFoundError: the cluster has no such host.
            ConflictError: `until` is over already.
            StorageError: it cannot be written down; nothing is drained then.
        """
        self._check_known(host)
        now = time.time()
        if until is not None and until <= now:
            msg = f"{host} cannot be drained until a time that is over"
            raise ConflictError(msg, hint="give a later time, as --until 2h")
        self._drains.put(Drain(host=host, person=person, since=now, until=until))
        if stop:
            for record in self._running(host):
                self._stop(record, Reason.HOST_DRAINED, f"{host} is drained by {person}")
        self._observed.notify()
        return self._seen(host)

    def undrain(self, host: str) -> HostJobs:
        """Let a host take jobs again.

        Raises:
            NotFoundError: it is not drained.
            StorageError: it cannot be written down.
        """
        self._drains.remove(host)
        self._observed.notify()
        return self._seen(host)

    def pause(self, *, limit_s: float, stop: bool, person: str) -> Quiet:
        """Let no attempt begin anywhere for a while; with `stop`, what runs is stopped and queued again."""
        self._observed.paused_until = time.time() + limit_s
        self._observed.pause_reason = f"{person} takes the cluster down or upgrades it"
        if stop:
            for record in self._records.active():
                self._stop(record, Reason.CLUSTER_DOWN, self._observed.pause_reason)
        self._observed.notify()
        return self.pause_state()

    def resume(self) -> Quiet:
        """Let attempts begin again."""
        self._observed.paused_until = 0.0
        self._observed.notify()
        return self.pause_state()

    def pause_state(self) -> Quiet:
        """Say until when no attempt begins, and what still runs."""
        until = self._observed.paused_until
        jobs = tuple(record.view() for record in self._records.active())
        return Quiet(until=until if until > time.time() else None, jobs=jobs)

    def _stop(self, record: JobRecord, reason: Reason, why: str) -> None:
        """End the attempt, not the job: its state stays as it is until it is queued again."""
        if record.stop_wish is not None:
            return
        self._records.update(
            record.id,
            kind="stopping",
            message=f"{why}; it is stopped, and another attempt follows",
            reason=reason,
            stop_wish=StopWish(why="stopped", grace_s=record.own_spec.grace_s),
            again=True,
        )

    def _check_known(self, host: str) -> None:
        known = {node.hostname for node in self._observed.nodes} | set(self._drains.now())
        if host not in known:
            msg = f"the cluster has no host {host!r}; it has {', '.join(sorted(known)) or 'none that is up'}"
            raise NotFoundError(msg, hint="see: raylaunch status")

    def _running(self, host: str) -> list[JobRecord]:
        return [record for record in self._records.active() if latest(record).node == host]

    def _seen(self, host: str) -> HostJobs:
        running = self._running(host)
        node = next((node for node in self._observed.nodes if node.hostname == host and node.alive), None)
        return HostJobs(
            host=host,
            drain=self._drains.now().get(host),
            jobs=tuple(record.view() for record in running),
            others="" if running or node is None else in_use(node),
        )


def in_use(node: NodeView) -> str:
    """Say in words what Ray counts as used on a node; empty when nothing is. Pure."""
    gpus, cpus = node.gpus - node.gpus_free, node.cpus - node.cpus_free
    used = [
        f"{amount:g} {name}{'' if amount == 1 else 's'}"
        for amount, name in ((gpus, "GPU"), (cpus, "CPU"))
        if amount > 0
    ]
    return f"Ray counts {' and '.join(used)} in use there" if used else ""
