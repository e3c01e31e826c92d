"""Pushing wheels to hosts, compared with scp of the same files: to one host, over a long link, to four at once.

The hosts are namespaces of this machine with a real sshd (`tests/support/hosts.py`), so this needs root.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anyio

from benchmarks.hosts import Host, World, lab
from benchmarks.measure import Result, compared, in_turns, seconds
from benchmarks.workshop import Workshop
from raylaunch.cluster.install.resolve import Wheel
from raylaunch.cluster.install.wheel_push import HostWheels, InstalledFiles
from raylaunch.cluster.install.wheel_store import WheelStore
from raylaunch.ssh.host import machine

_MB = 1_000_000
# As Ray, wandb and what they need were in November 2026: a few large wheels and many small ones, 155 MB in all.
_SIZES_MB = (79.3, 20.3, 17.6, 7.4, 5.7, 4.8, 2.9, 2.3, *([0.2] * 76))
_ROUNDS = 3
_DELAY_MS = 50.0


def run(shop: Workshop) -> Iterator[Result]:
    """Measure pushing and scp for one host, for four at once, and for one that is far away."""
    with lab(4) as made, tempfile.TemporaryDirectory(dir=shop.folder) as name:
        store = WheelStore(Path(name))
        wheels = [_wheel(store, number, round(size * _MB)) for number, size in enumerate(_SIZES_MB)]

        def result(name: str, hosts: Sequence[Host], how: str) -> Result:
            pairs = in_turns(
                lambda: _emptied_first(hosts, lambda: _push_to(hosts, store, wheels)),
                lambda: _emptied_first(hosts, lambda: _copy_to(made, hosts, [store.path(one) for one in wheels])),
                rounds=shop.rounds(_ROUNDS),
            )
            return compared(name, pairs, unit="s", peer="scp", how=how)

        what = f"the {len(wheels)} wheels of an environment, {sum(_SIZES_MB):.0f} MB,"
        yield result("push_wheels", made.hosts[:1], f"Time to push {what} to a host without any, connecting included.")
        yield result(
            "push_wheels_to_four", made.hosts, f"The same to four hosts at once, compared with four scp at once: {what}"
        )
        made.hosts[0].slow(rtt_ms=_DELAY_MS)
        yield result("push_wheels_far", made.hosts[:1], f"The same to one host {_DELAY_MS:.0f} ms away.")


def _wheel(store: WheelStore, number: int, size: int) -> Wheel:
    content = os.urandom(size)
    sha256 = hashlib.sha256(content).hexdigest()
    wheel = Wheel(name=f"p{number}", version="1", file=f"p{number}-1-py3-none-any.whl", sha256=sha256, bytes=size)
    store.path(wheel).parent.mkdir(parents=True)
    store.path(wheel).write_bytes(content)
    return wheel


def _push_to(hosts: Sequence[Host], store: WheelStore, wheels: Sequence[Wheel]) -> None:
    anyio.run(_push_to_all, hosts, store, wheels)


def _emptied_first(hosts: Sequence[Host], work: Callable[[], object]) -> float:
    """Return how long `work` takes on hosts without wheels; what is still to be written is written before."""
    for host in hosts:
        host.run("rm -rf /root/pushed; mkdir -p /root/pushed/wheels")
    os.sync()
    return seconds(work)


async def _push_to_all(hosts: Sequence[Host], store: WheelStore, wheels: Sequence[Wheel]) -> None:
    async with anyio.create_task_group() as tasks:
        for host in hosts:
            tasks.start_soon(_push, host, store, wheels)


async def _push(host: Host, store: WheelStore, wheels: Sequence[Wheel]) -> None:
    seen = InstalledFiles(wheels="/root/pushed/wheels", free_bytes=sys.maxsize)
    async with machine(host.target()) as connection:
        await HostWheels(connection, store, lambda _step: None, limit_bytes_per_s=None).push(wheels, seen)


def _copy_to(made: World, hosts: Sequence[Host], files: Sequence[Path]) -> None:
    copying = [
        subprocess.Popen(["scp", "-q", "-F", str(made.config), *map(str, files), f"{host.name}:/root/pushed/wheels"])
        for host in hosts
    ]
    statuses = [process.wait() for process in copying]
    if any(statuses):
        msg = "scp failed"
        raise RuntimeError(msg)
