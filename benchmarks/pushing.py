"""Pushing the wheels of an environment to hosts, beside scp of the same files: one host, a long link, four at once.

The hosts are namespaces of this machine with a real sshd (`tests/support/hosts.py`), so this needs root.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from benchmarks.measure import Result, Skipped, medians
from raylaunch.cluster.host_wheels import HostWheels, Seen
from raylaunch.cluster.installer_call import Interpreter
from raylaunch.cluster.resolving import Wheel
from raylaunch.cluster.ssh import machine
from raylaunch.cluster.wheels import WheelStore

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.hosts import Host, World, world

_MB = 1_000_000
# As Ray, wandb and what they need were in November 2026: a few large wheels and many small ones, 155 MB in all.
_SIZES_MB = (79.3, 20.3, 17.6, 7.4, 5.7, 4.8, 2.9, 2.3, *([0.2] * 76))
_PYTHON = "/usr/bin/python3"
_ROUNDS = 3
_DELAY_MS = 50.0
_AS_FAST = 1 / 0.9
"""At least nine tenths of scp's throughput."""


def run() -> Iterator[Result]:
    """Yield seconds of pushing and of scp, for one host, one far away, and four."""
    with _lab(4) as lab, tempfile.TemporaryDirectory() as name:
        store = WheelStore(Path(name))
        wheels = [_wheel(store, number, round(size * _MB)) for number, size in enumerate(_SIZES_MB)]
        yield _compared("pushing wheels to one host", lab, lab.hosts[:1], store, wheels, bar=_AS_FAST)
        yield _compared("pushing wheels to four hosts at once", lab, lab.hosts, store, wheels, bar=_AS_FAST)
        lab.hosts[0].slow(rtt_ms=_DELAY_MS)
        title = f"pushing wheels to one host {_DELAY_MS:.0f} ms away"
        yield _compared(title, lab, lab.hosts[:1], store, wheels, bar=1.0)


@contextmanager
def _lab(hosts: int) -> Iterator[World]:
    try:
        with world(hosts) as lab:
            yield lab
    except pytest.skip.Exception as reason:
        raise Skipped(str(reason)) from None


def _wheel(store: WheelStore, number: int, size: int) -> Wheel:
    content = os.urandom(size)
    sha256 = hashlib.sha256(content).hexdigest()
    wheel = Wheel(name=f"p{number}", version="1", file=f"p{number}-1-py3-none-any.whl", sha256=sha256, bytes=size)
    store.path(wheel).parent.mkdir(parents=True)
    store.path(wheel).write_bytes(content)
    return wheel


def _compared(  # noqa: PLR0913, PLR0917 -- what is measured
    title: str, lab: World, hosts: Sequence[Host], store: WheelStore, wheels: Sequence[Wheel], bar: float
) -> Result:
    def push() -> None:
        _emptied(hosts)
        anyio.run(_push_to_all, hosts, store, wheels)

    def copy() -> None:
        _emptied(hosts)
        _copy_to_all(lab, hosts, [store.path(one) for one in wheels])

    ours, theirs = medians(push, copy, rounds=_ROUNDS)
    return Result(title, ours, "s", "scp", theirs, bar)


def _emptied(hosts: Sequence[Host]) -> None:
    for host in hosts:
        host.run("rm -rf /root/pushed; mkdir -p /root/pushed/wheels")


async def _push_to_all(hosts: Sequence[Host], store: WheelStore, wheels: Sequence[Wheel]) -> None:
    async with anyio.create_task_group() as tasks:
        for host in hosts:
            tasks.start_soon(_push, host, store, wheels)


async def _push(host: Host, store: WheelStore, wheels: Sequence[Wheel]) -> None:
    seen = Seen(wheels="/root/pushed/wheels", free_bytes=sys.maxsize)
    async with machine(host.target()) as connection:
        python = Interpreter(_PYTHON)
        on_host = HostWheels(connection, python, store, lambda _step: None, root="/root/pushed", limit_bytes_per_s=None)
        await on_host.push(wheels, seen)


def _copy_to_all(lab: World, hosts: Sequence[Host], files: Sequence[Path]) -> None:
    copying = [
        subprocess.Popen(["scp", "-q", "-F", str(lab.config), *map(str, files), f"{host.name}:/root/pushed/wheels"])
        for host in hosts
    ]
    statuses = [process.wait() for process in copying]
    if any(statuses):
        msg = "scp failed"
        raise RuntimeError(msg)
