"""The jobs that wait for their turn, in the queue's order. Kept up with each write of a record."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from operator import attrgetter

from raylaunch.controller.store.record import JobRecord
from raylaunch.models.job_spec import JobSpec, Where
from raylaunch.models.states import Reason

GPUS = "GPU"
CPUS = "CPU"
MEMORY = "memory"

Amounts = dict[str, float]
"""Resource name → amount: `GPUS`, `CPUS`, `MEMORY` (bytes), and custom resources by their own names."""


def needs(spec: JobSpec) -> Amounts:
    """Return what one attempt of `spec` holds on its node; nothing that is zero."""
    resources = spec.resources
    amounts: Amounts = {GPUS: resources.gpus, CPUS: resources.effective_cpus, MEMORY: resources.memory}
    return {name: amount for name, amount in {**resources.custom, **amounts}.items() if amount > 0}


@dataclass(frozen=True)
class ResourceRequest:
    """A job that waits."""

    job: str
    name: str
    since: float
    needs: Amounts
    where: Where = field(default_factory=Where)
    priority: int = 0

    @property
    def order(self) -> tuple[int, float, str]:
        """Its place in the queue: what is smaller goes first."""
        return (-self.priority, self.since, self.job)

    @cached_property
    def group(self) -> str:
        """The same for all jobs that ask for the same on the same nodes."""
        return f"{self.needs} {self.where.model_dump_json(exclude_defaults=True)}"


@dataclass(frozen=True)
class WaitDecision:
    """This job waits, and why."""

    job: str
    reason: Reason
    message: str


def ask_of(record: JobRecord) -> ResourceRequest:
    """Return what a waiting job asks for."""
    return ask_for(asked(record), job=record.id, since=record.created_at)


def ask_for(spec: JobSpec, *, job: str = "", since: float = 0.0) -> ResourceRequest:
    """Return what a spec asks for."""
    return ResourceRequest(
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


_ORDER = attrgetter("order")


class Backlog:
    """Waiting jobs, each once. What it yields is good until the next change.

    It holds no records: thousands of those would make each of Python's full garbage collections take 100 ms.

    Args:
        asks: those that wait already.
    """

    def __init__(self, asks: Iterable[ResourceRequest] = ()) -> None:
        self._asks: dict[str, ResourceRequest] = {}
        self._queue: list[ResourceRequest] = []
        self._groups: Counter[str] = Counter()
        self._fresh: dict[str, ResourceRequest] = {}
        self._told: dict[str, Reason | None] = {}
        for ask in sorted(asks, key=_ORDER):
            self.put(ask)

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._asks)

    def __iter__(self) -> Iterator[ResourceRequest]:
        """Yield the waiting jobs in the queue's order."""
        return iter(self._queue)

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self._groups)

    def wants(self, resource: str) -> bool:
        """Return whether a job waits that asks for some of the resource."""
        return any(ask.needs.get(resource) for ask in self._queue)

    def put(self, ask: ResourceRequest, *, told: Reason | None = None) -> None:
        """Let a job wait; one that waits already takes the place that it asks for now.

        Args:
            ask: the job.
            told: the reason that its record gives.
        """
        self._told[ask.job] = told
        if self._asks.get(ask.job) == ask:
            return
        self.drop(ask.job)
        self._told[ask.job] = told
        self._asks[ask.job] = self._fresh[ask.job] = ask
        self._groups[ask.group] += 1
        bisect.insort(self._queue, ask, key=_ORDER)

    def drop(self, job: str) -> None:
        """Let a job wait no longer; one that does not wait is no matter."""
        self._told.pop(job, None)
        ask = self._asks.pop(job, None)
        if ask is None:
            return
        self._fresh.pop(job, None)
        del self._queue[bisect.bisect_left(self._queue, ask.order, key=_ORDER)]
        self._groups[ask.group] -= 1
        if not self._groups[ask.group]:
            del self._groups[ask.group]

    @contextmanager
    def joined_by(self, ask: ResourceRequest) -> Iterator[None]:
        """Let one more job wait inside the block."""
        self.put(ask)
        try:
            yield
        finally:
            self.drop(ask.job)

    def ask(self, job: str) -> ResourceRequest | None:
        """Return what a job asks for; None when it does not wait."""
        return self._asks.get(job)

    def told(self, job: str) -> Reason | None:
        """Return the reason that is recorded of a job."""
        return self._told[job]

    def first(self, most: int) -> Sequence[ResourceRequest]:
        """Return the first jobs of the queue."""
        return self._queue[:most]

    def fresh(self, most: int) -> Iterator[ResourceRequest]:
        """Yield jobs that have begun to wait and are not settled yet."""
        return islice(self._fresh.values(), most)

    def settle(self, asks: Iterable[ResourceRequest]) -> None:
        """Take it that what these jobs wait for is recorded."""
        for ask in asks:
            self._fresh.pop(ask.job, None)
