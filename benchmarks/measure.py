"""What a benchmark gives back, and how figures are taken."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_RESAMPLES = 10_000
_CPUINFO = Path("/proc/cpuinfo")
_OS_RELEASE = Path("/etc/os-release")


@dataclass(frozen=True)
class Result:
    """One figure of ours, and mostly a peer's, in the same unit and taken in turns. Less is better."""

    name: str
    figure: float
    unit: str
    how: str
    """What was measured, in a sentence or two."""
    peer: str = ""
    """What it is compared with; empty where there is nothing like it."""
    peer_figure: float | None = None
    paired: tuple[float, float, float] | None = None
    """Of runs in pairs: the median of their ratios, and its 95 % confidence interval."""

    @property
    def ratio(self) -> float | None:
        """Our figure as a part of the peer's."""
        if self.paired is not None:
            return self.paired[0]
        return None if self.peer_figure is None else self.figure / self.peer_figure

    @property
    def excess(self) -> float:
        """What our figure is above the peer's."""
        return self.figure - (self.peer_figure or 0.0)


class Skipped(Exception):  # noqa: N818 -- not an error: this machine cannot run that benchmark
    """A benchmark that cannot run here, with the reason."""


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(
    ours: Callable[[], float], theirs: Callable[[], float], *, rounds: int, warm: int = 1
) -> list[tuple[float, float]]:
    """Return the figures of both in pairs, taken in turns so that a busy moment hits both.

    Which of the two is first changes from round to round. The first `warm` rounds are not counted.
    """
    pairs: list[tuple[float, float]] = []
    for turn in range(rounds + warm):
        if turn % 2:
            second = theirs()
            pair = (ours(), second)
        else:
            pair = (ours(), theirs())
        if turn >= warm:
            pairs.append(pair)
    return pairs


def compared(name: str, pairs: Sequence[tuple[float, float]], *, unit: str, peer: str, how: str) -> Result:
    """Return the result of runs in pairs: the median of each side, and of their ratios."""
    figure, peer_figure = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Result(name, figure, unit, how, peer=peer, peer_figure=peer_figure, paired=paired_ratio(pairs))


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the median of the pairs' ratios, and its 95 % confidence interval.

    The interval is the percentile bootstrap's over whole pairs (Efron & Tibshirani, An Introduction to the Bootstrap,
    chapter 13), with a seed of its own, so that the same pairs give the same interval.
    """
    ratios = [ours / theirs for ours, theirs in pairs]
    dice = random.Random(0)  # noqa: S311 -- a bootstrap, not a secret
    found = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return statistics.median(ratios), found[_RESAMPLES * 25 // 1000], found[_RESAMPLES * 975 // 1000]


def machine() -> dict[str, str | int]:
    """Return what kind of machine this is, without its name."""
    return {
        "cpu": _field(_CPUINFO, "model name") or platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "os": _field(_OS_RELEASE, "PRETTY_NAME") or platform.system(),
        "python": platform.python_version(),
    }


def _field(file: Path, name: str) -> str:
    """Return the value of the first line ``name : value`` or ``name="value"`` of a file."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    words = (line.replace(":", "=", 1).partition("=") for line in lines)
    return next((value.strip().strip('"') for key, _, value in words if key.strip() == name), "")
