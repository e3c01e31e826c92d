"""What a benchmark gives back, and how times are taken."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Result:
    """One figure of ours beside a peer's, in the same unit, taken in turns on the same machine. Less is better."""

    name: str
    figure: float
    unit: str
    peer: str
    peer_figure: float
    bar: float
    """The ratio that must not be exceeded."""

    @property
    def ratio(self) -> float:
        """Our figure as a part of the peer's."""
        return self.figure / self.peer_figure

    @property
    def held(self) -> bool:
        """Whether the ratio is within the bar."""
        return self.ratio <= self.bar


class Skipped(Exception):  # noqa: N818 -- not an error: this machine cannot run that benchmark
    """A benchmark that cannot run here, with the reason."""


def medians(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int) -> tuple[float, float]:
    """Return the median seconds of both, taken in turns so that a busy moment hits both; round one is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for work, seconds in zip((ours, theirs), times, strict=True):
            began = time.perf_counter()
            work()
            if turn:
                seconds.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def machine() -> str:
    """Say what kind of machine this is, without its name."""
    memory = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()} {platform.machine()}"
    return f"{system}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"
