"""Processes of attempts: finding them, checking whether they are running, ending them.

A process belongs to an attempt if, and only if, its environment has its id (`raylaunch.contract.VAR_ATTEMPT`); that
is true for children that called setsid too. Linux only: everything is read from /proc.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from raylaunch.contract import VAR_ATTEMPT, Claim
from raylaunch.errors import ClusterError
from raylaunch.runner.processes import is_this_boot, read_stat

_PROC = Path("/proc")
_ROUND_S = 0.02


class ProcessId(NamedTuple):
    """One process until a reboot: a pid alone is reused."""

    pid: int
    started_ticks: int


def started_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None when it has exited, a zombie too."""
    fields = read_stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def runner_alive(claim: Claim | None) -> bool:
    """Return whether the runner that made a claim is running."""
    if claim is None or not is_this_boot(claim["boot_id"]) or claim["pid"] <= 0:
        return False
    return started_ticks(claim["pid"]) == claim["started_ticks"]


def wait_for_runner(claim: Claim, *, limit_s: float) -> None:
    """Wait until the runner that made a claim has ended by itself, at most `limit_s`."""
    deadline = time.monotonic() + limit_s
    while runner_alive(claim) and time.monotonic() < deadline:
        time.sleep(_ROUND_S)


def environment_of(pid: int) -> tuple[bytes, ...]:
    """Return the ``NAME=value`` entries with which a process was started; none if they cannot be read."""
    try:
        return tuple((_PROC / str(pid) / "environ").read_bytes().split(b"\0"))
    except OSError:
        return ()


def processes_of(tag: str) -> Iterator[ProcessId]:
    """Yield the running processes of one attempt, except this process.

    Args:
        tag: The attempt's value of `VAR_ATTEMPT`.
    """
    entry = f"{VAR_ATTEMPT}={tag}".encode()
    for name in os.listdir(_PROC):  # noqa: PTH208 -- a Path for each of thousands of processes is slow
        if not name.isdigit() or int(name) == os.getpid():
            continue
        ticks = started_ticks(int(name))
        if ticks is not None and entry in environment_of(int(name)):
            yield ProcessId(int(name), ticks)


def end_processes(tag: str, claim: Claim | None, *, limit_s: float = 30.0) -> int:
    """SIGKILL the runner and all processes of an attempt, until none is left. May be repeated.

    Args:
        tag: The attempt's value of `VAR_ATTEMPT`.
        claim: Names the runner, which does not carry the tag itself.
        limit_s: How long processes may take to disappear.

    Returns:
        How many processes were ended.

    Raises:
        ClusterError: Some were still there after `limit_s`, or ending them is not permitted.
    """
    deadline = time.monotonic() + limit_s
    killed: set[ProcessId] = set()
    empty_rounds = 0
    while empty_rounds < 2:  # noqa: PLR2004 -- a child forked behind the first look is seen by the second
        left = set(processes_of(tag))
        if claim is not None and runner_alive(claim):
            left.add(ProcessId(claim["pid"], claim["started_ticks"]))
        killed.update(process for process in left if _kill(process))
        empty_rounds = 0 if left else empty_rounds + 1
        if left and time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in sorted(left))
            msg = f"processes {pids} are still running {limit_s:.0f} s after SIGKILL"
            raise ClusterError(msg, hint="a process that waits for a disk or a driver exits when that responds")
        if left:
            time.sleep(_ROUND_S)
    return len(killed)


def _kill(process: ProcessId) -> bool:
    """Kill exactly this process: the descriptor excludes another one with the same pid."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        if started_ticks(process.pid) != process.started_ticks:
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        msg = f"process {process.pid} cannot be ended: {error}"
        raise ClusterError(msg) from error
    finally:
        os.close(descriptor)
    return True
