"""Requests about hosts: drain one, pause all of them for a while, resume."""

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

_RAY_LAG_S = 3.0
"""How long after a job's end Ray may still count what it used, until the nodes are inspected again."""


class HostService:
    """Operations on hosts. Each returns within seconds; the scheduler's loop continues from the records."""

    def __init__(self, *, records: Records, drains: DrainStore, observed: ObservedState) -> None:
        self._records = records
        self._drains = drains
        self._observed = observed

    async def jobs(self, host: str) -> HostJobs:
        """Return what is running on a host, and whether it is drained.

        Raises:
            NotFoundError: the cluster has no such host.
        """
        self._check_known(host)
        return await self._settled(host)

    async def drain(self, host: str, *, until: float | None, stop: bool, person: str) -> HostJobs:
        """Start no new attempts on a host; with `stop`, running ones are stopped and queued again.

        Args:
            host: its name.
            until: end of the drain, seconds since the epoch; None until it is lifted by hand.
            stop: whether running jobs are stopped, each with its own grace period.
            person: who requests it.

        Raises:
            NotFoundError: the cluster has no such host.
            ConflictError: `until` is in the past.
            StorageError: it cannot be stored; nothing is drained then.
        """
        self._check_known(host)
        now = time.time()
        if until is not None and until <= now:
            msg = f"cannot drain {host}: the drain's end is in the past"
            raise ConflictError(msg, hint="give a later time, for example --until 2h")
        self._drains.put(Drain(host=host, person=person, since=now, until=until))
        if stop:
            for record in self._running(host):
                self._stop(record, Reason.HOST_DRAINED, f"{host} is being drained by {person}")
        self._observed.notify()
        return await self._settled(host)

    async def undrain(self, host: str) -> HostJobs:
        """Let a host take jobs again.

        Raises:
            NotFoundError: it is not drained.
            StorageError: it cannot be stored.
        """
        self._drains.remove(host)
        self._observed.notify()
        return await self._settled(host)

    def pause(self, *, limit_s: float, stop: bool, person: str) -> Quiet:
        """Start no attempts anywhere for a while; with `stop`, running ones are stopped and queued again."""
        self._observed.paused_until = time.time() + limit_s
        self._observed.pause_reason = f"{person} is shutting down or upgrading the cluster"
        if stop:
            for record in self._records.active():
                self._stop(record, Reason.CLUSTER_DOWN, self._observed.pause_reason)
        self._observed.notify()
        return self.pause_state()

    def resume(self) -> Quiet:
        """Start attempts again."""
        self._observed.paused_until = 0.0
        self._observed.notify()
        return self.pause_state()

    def pause_state(self) -> Quiet:
        """Return until when no attempt starts, and what is still running."""
        until = self._observed.paused_until
        jobs = tuple(record.view() for record in self._records.active())
        return Quiet(until=until if until > time.time() else None, jobs=jobs)

    def _stop(self, record: JobRecord, reason: Reason, why: str) -> None:
        """Stop the attempt, not the job: its state remains until it is queued again."""
        if record.stop_wish is not None:
            return
        self._records.update(
            record.id,
            kind="stopping",
            message=f"{why}; stopping this attempt, which will be retried",
            reason=reason,
            stop_wish=StopWish(why="stopped", grace_s=record.own_spec.grace_s),
            again=True,
        )

    def _check_known(self, host: str) -> None:
        known = {node.hostname for node in self._observed.nodes} | set(self._drains.now())
        if host not in known:
            msg = f"the cluster has no host {host!r}; it has {', '.join(sorted(known)) or 'no host that is up'}"
            raise NotFoundError(msg, hint="see: raylaunch status")

    def _running(self, host: str) -> list[JobRecord]:
        return [record for record in self._records.active() if latest(record).node == host]

    async def _settled(self, host: str) -> HostJobs:
        """Return what is running on a host. Ray counts what a job used for a moment after its end: that is awaited."""
        deadline = time.monotonic() + _RAY_LAG_S
        while (found := self._seen(host)).others and self._observed.bridge_up:
            if (left_s := deadline - time.monotonic()) <= 0:
                break
            await self._observed.wait(left_s)
        return found

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
    """Return in words what Ray counts as used on a node; empty if nothing is. Pure."""
    gpus, cpus = node.gpus - node.gpus_free, node.cpus - node.cpus_free
    used = [
        f"{amount:g} {name}{'' if amount == 1 else 's'}"
        for amount, name in ((gpus, "GPU"), (cpus, "CPU"))
        if amount > 0
    ]
    return f"Ray counts {' and '.join(used)} in use there" if used else ""
