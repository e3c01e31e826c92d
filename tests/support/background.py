"""The command line as a process that goes on while a test does other things; and how much memory processes take."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from support.cluster import Cluster
from support.waiting import wait_until

MB = 1_000_000


class Command:
    """A running ``raylaunch``. What it prints goes to files, so that it never waits for a reader."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self._process = process
        self._out = out
        self._err = err
        self.status: int | None = None
        self.peak_bytes = 0
        """The most memory that it had when it was last looked at."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def out(self) -> bytes:
        return self._out.read_bytes()

    def sha256(self) -> str:
        """Return the checksum of what it has printed, which may be large."""
        digest = hashlib.sha256()
        with self._out.open("rb") as file:
            while block := file.read(MB):
                digest.update(block)
        return digest.hexdigest()

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def ended(self) -> bool:
        """Whether it has ended; does not wait."""
        self.peak_bytes = max(self.peak_bytes, _memory_bytes(self.pid, "VmHWM"))
        self.status = self._process.poll()
        return self.status is not None

    def wait(self, timeout_s: float = 60) -> int:
        """Wait for its end and return its exit status."""
        wait_until(self.ended, timeout_s, f"the command ends; it said: {self.err[-500:]}")
        assert self.status is not None
        return self.status


@contextmanager
def started(cluster: Cluster, *words: str, cwd: Path | None = None) -> Iterator[Command]:
    """Start ``raylaunch`` with these words in the background; kill it at the end if it still runs."""
    out, err = (cluster.work / f"{name}-{os.urandom(4).hex()}" for name in ("out", "err"))
    with out.open("wb") as to, err.open("wb") as also:
        process = subprocess.Popen(
            [sys.executable, "-m", "raylaunch", *words],
            cwd=cwd or cluster.work,
            env=cluster.env,
            stdout=to,
            stderr=also,
        )
    command = Command(process, out, err)
    try:
        yield command
    finally:
        if not command.ended():
            process.kill()
            command.wait()
        out.unlink()


class Memory:
    """The own memory (not what is shared with other processes) of some processes: at first, and at most."""

    def __init__(self, processes: Iterable[tuple[str, psutil.Process]]) -> None:
        self._processes = dict(processes)
        self._first = {name: _memory_bytes(process.pid, "RssAnon") for name, process in self._processes.items()}
        self._most = dict(self._first)

    def look(self) -> None:
        """Look once."""
        for name, process in self._processes.items():
            self._most[name] = max(self._most[name], _memory_bytes(process.pid, "RssAnon"))

    def growth(self) -> dict[str, int]:
        """Return by how many bytes each has grown at most."""
        return {name: self._most[name] - self._first[name] for name in self._processes}


def _memory_bytes(pid: int, field: str) -> int:
    """Return what the kernel says of a process's memory; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def memory_of(cluster: Cluster) -> Memory:
    """Return the memory of the controller, its bridge and the node agent."""
    found: list[tuple[str, psutil.Process]] = [("controller", psutil.Process(cluster.controller_pid()))]
    for process in cluster.processes():
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            continue
        if words.startswith(("ray::NodeAgent", "ray::Steward")):
            found.append(("agent", process))
        elif "raylaunch.controller.ray.process" in words:
            found.append(("bridge", process))
    assert {name for name, _ in found} == {"controller", "bridge", "agent"}
    return Memory(found)
