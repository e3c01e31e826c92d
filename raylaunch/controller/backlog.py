"""The jobs that wait for their turn, in the queue's order. Kept up with each write of a record."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from operator import attrgetter

from raylaunch.controller.queue import Ask
from raylaunch.reasons import Reason

_ORDER = attrgetter("order")


class Backlog:
    """Waiting jobs, each once. What it yields is good until the next change.

    It holds no records: thousands of those would make each of Python's full garbage collections take 100 ms.

    Args:
        asks: those that wait already.
    """

    def __init__(self, asks: Iterable[Ask] = ()) -> None:
        self._asks: dict[str, Ask] = {}
        self._queue: list[Ask] = []
        self._groups: Counter[str] = Counter()
        self._fresh: dict[str, Ask] = {}
        self._told: dict[str, Reason | None] = {}
        for ask in sorted(asks, key=_ORDER):
            self.put(ask)

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._asks)

    def __iter__(self) -> Iterator[Ask]:
        """Yield the waiting jobs in the queue's order."""
        return iter(self._queue)

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self._groups)

    def wants(self, resource: str) -> bool:
        """Return whether a job waits that asks for some of the resource."""
        return any(ask.needs.get(resource) for ask in self._queue)

    def put(self, ask: Ask, *, told: Reason | None = None) -> None:
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
    def joined_by(self, ask: Ask) -> Iterator[None]:
        """Let one more job wait inside the block."""
        self.put(ask)
        try:
            yield
        finally:
            self.drop(ask.job)

    def ask(self, job: str) -> Ask | None:
        """Return what a job asks for; None when it does not wait."""
        return self._asks.get(job)

    def told(self, job: str) -> Reason | None:
        """Return the reason that is recorded of a job."""
        return self._told[job]

    def first(self, most: int) -> Sequence[Ask]:
        """Return the first jobs of the queue."""
        return self._queue[:most]

    def fresh(self, most: int) -> Iterator[Ask]:
        """Yield jobs that have begun to wait and are not settled yet."""
        return islice(self._fresh.values(), most)

    def settle(self, asks: Iterable[Ask]) -> None:
        """Take it that what these jobs wait for is recorded."""
        for ask in asks:
            self._fresh.pop(ask.job, None)
