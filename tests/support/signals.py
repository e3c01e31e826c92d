"""Signals to processes that may have exited a moment ago: a program ends when it likes, and a test goes on."""

from __future__ import annotations

import contextlib
import os
import signal

from raylaunch.cluster.processes import ProcessIdentity, is_alive
from support.waiting import wait_until


def send(process: int | ProcessIdentity, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process, by its pid or its identity; one that has exited gets none."""
    pid = process if isinstance(process, int) else process.pid
    assert pid > 0
    if isinstance(process, int) or is_alive(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def send_group(group: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process group; one that has exited gets none."""
    assert group > 0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def kill(process: ProcessIdentity | None) -> ProcessIdentity:
    """Kill a process, wait until it has exited, and return it."""
    assert process is not None
    send(process)
    wait_until(lambda: not is_alive(process), 60, "the process has exited")
    return process
