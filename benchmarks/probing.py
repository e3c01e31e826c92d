"""Probing many hosts that are far away and planning their cluster, compared with the same for one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.hosts import Laptop, World, lab
from benchmarks.measure import Result, compared, in_turns, seconds
from benchmarks.workshop import Workshop

_HOSTS = 16
_DELAY_MS = 50.0
_ROUNDS = 5


def run(shop: Workshop) -> Iterator[Result]:
    """Measure `raylaunch up --dry-run`: it probes, and reports what it would do."""
    with lab(_HOSTS) as made, tempfile.TemporaryDirectory(dir=shop.folder) as name:
        for host in made.hosts:
            host.slow(rtt_ms=_DELAY_MS)
        many, one = _laptop(made, Path(name) / "many", _HOSTS), _laptop(made, Path(name) / "one", 1)
        pairs = in_turns(
            lambda: seconds(partial(many.call, "up", "--dry-run")),
            lambda: seconds(partial(one.call, "up", "--dry-run")),
            rounds=shop.rounds(_ROUNDS),
        )
    how = (
        f"`raylaunch up --dry-run` of {_HOSTS} hosts, each {_DELAY_MS:.0f} ms away: probe and plan. All of them, "
        "and their links, share the cores of this machine."
    )
    yield compared("probe_and_plan", pairs, unit="s", peer="the same for one host", how=how)


def _laptop(made: World, folder: Path, hosts: int) -> Laptop:
    names = ", ".join(host.name for host in made.hosts[:hosts])
    return Laptop(made, folder, f"name: lab\nhosts: [{names}]\n")
