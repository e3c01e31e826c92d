"""The queued jobs and their resource requests, in the queue's order. Updated with each write of a record."""

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
_ORDER = attrgetter("order")


def required_amounts(spec: JobSpec) -> Amounts:
    """Return what one attempt of `spec` needs on its node, without zero amounts."""
    resources = spec.resources
    amounts: Amounts = {GPUS: resources.gpus, CPUS: resources.effective_cpus, MEMORY: resources.memory}
    return {name: amount for name, amount in {**resources.custom, **amounts}.items() if amount > 0}


@dataclass(frozen=True)
class ResourceRequest:
    """What a queued job needs, and where."""

    job: str
    name: str
    since: float
    needs: Amounts
    where: Where = field(default_factory=Where)
    priority: int = 0

    @property
    def order(self) -> tuple[int, float, str]:
        """Sort key of the queue."""
        return (-self.priority, self.since, self.job)

    @cached_property
    def group(self) -> str:
        """Equal for all jobs with the same needs and placement."""
        return f"{self.needs} {self.where.model_dump_json(exclude_defaults=True)}"


@dataclass(frozen=True)
class WaitDecision:
    """A job that waits, and why."""

    job: str
    reason: Reason
    message: str


def request_of(record: JobRecord) -> ResourceRequest:
    """Return the resource request of a queued job."""
    return request_for(record.own_spec, job=record.id, since=record.created_at)


def request_for(spec: JobSpec, *, job: str = "", since: float = 0.0) -> ResourceRequest:
    """Return the resource request of a spec."""
    return ResourceRequest(
        job=job,
        name=spec.display_name,
        since=since,
        needs=required_amounts(spec),
        where=spec.where,
        priority=spec.priority,
    )


class Backlog:
    """Queued jobs, each once. Iterators are valid until the next change.

    It holds no records: with thousands of them each full garbage collection of Python would take 100 ms.

    Args:
        requests: the jobs that are already queued.
    """

    def __init__(self, requests: Iterable[ResourceRequest] = ()) -> None:
        self._requests: dict[str, ResourceRequest] = {}
        self._queue: list[ResourceRequest] = []
        self._groups: Counter[str] = Counter()
        self._unrecorded: dict[str, ResourceRequest] = {}
        self._recorded: dict[str, Reason | None] = {}
        for request in sorted(requests, key=_ORDER):
            self.put(request)

    def __len__(self) -> int:
        """Return the number of queued jobs."""
        return len(self._requests)

    def __iter__(self) -> Iterator[ResourceRequest]:
        """Yield the queued jobs in the queue's order."""
        return iter(self._queue)

    @property
    def groups(self) -> int:
        """Number of groups of equal requests."""
        return len(self._groups)

    def wants(self, resource: str) -> bool:
        """Whether a queued job needs some of the resource."""
        return any(request.needs.get(resource) for request in self._queue)

    def put(self, request: ResourceRequest, *, recorded: Reason | None = None) -> None:
        """Add a job, or update the request of a queued one.

        Args:
            request: the job's request.
            recorded: the wait reason in its record.
        """
        self._recorded[request.job] = recorded
        if self._requests.get(request.job) == request:
            return
        self.drop(request.job)
        self._recorded[request.job] = recorded
        self._requests[request.job] = self._unrecorded[request.job] = request
        self._groups[request.group] += 1
        bisect.insort(self._queue, request, key=_ORDER)

    def drop(self, job: str) -> None:
        """Remove a job, if it is queued."""
        self._recorded.pop(job, None)
        request = self._requests.pop(job, None)
        if request is None:
            return
        self._unrecorded.pop(job, None)
        del self._queue[bisect.bisect_left(self._queue, request.order, key=_ORDER)]
        self._groups[request.group] -= 1
        if not self._groups[request.group]:
            del self._groups[request.group]

    @contextmanager
    def joined_by(self, request: ResourceRequest) -> Iterator[None]:
        """Add one more job inside the block."""
        self.put(request)
        try:
            yield
        finally:
            self.drop(request.job)

    def get(self, job: str) -> ResourceRequest | None:
        """Return a job's request; None if it is not queued."""
        return self._requests.get(job)

    def recorded_reason(self, job: str) -> Reason | None:
        """Return the recorded wait reason of a job."""
        return self._recorded[job]

    def first(self, most: int) -> Sequence[ResourceRequest]:
        """Return the first jobs in the queue."""
        return self._queue[:most]

    def unrecorded(self, most: int) -> Iterator[ResourceRequest]:
        """Yield newly queued jobs whose wait reason has not been recorded yet."""
        return islice(self._unrecorded.values(), most)

    def mark_recorded(self, requests: Iterable[ResourceRequest]) -> None:
        """Note that the wait reasons of these jobs have been recorded."""
        for request in requests:
            self._unrecorded.pop(request.job, None)
