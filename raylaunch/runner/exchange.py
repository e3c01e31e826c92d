"""Every pair of members exchanges bytes over its TCP connections: which pair does not, and how fast the slowest is.

It stands in for PyTorch's all-reduce where a member has no PyTorch. In round k each member sends to the member k places
after it and receives from the member k places before it, so that each link is used in both directions, one at a time.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import NamedTuple

from raylaunch.runner.meeting import Meeting, words_of

_PIECE = 1024 * 1024


class HopError(Exception):
    """From `sender` to `receiver` the bytes did not pass, in round `step`."""

    def __init__(self, sender: int, receiver: int, why: str, *, step: int) -> None:
        super().__init__(why)
        self.sender = sender
        self.receiver = receiver
        self.why = why
        self.step = step


class Limits(NamedTuple):
    """How long nothing may pass, and how long all rounds may take, in seconds."""

    quiet_s: float
    whole_s: float


def exchange(meeting: Meeting, rank: int, size: int, nbytes: int, limits: Limits) -> float:
    """Exchange `nbytes` bytes with every other member; return the slowest rate at which they came, in bytes a second.

    Raises:
        HopError: nothing passed for `limits.quiet_s`, the time is up, or a connection ended.
    """
    until, slowest = time.monotonic() + limits.whole_s, float("inf")
    for step in range(1, size):
        target, source = (rank + step) % size, (rank - step) % size
        sender = _Sender(meeting.out[target], nbytes, limits.quiet_s)
        try:
            seconds = _receive(meeting.came[source], nbytes, limits.quiet_s, until)
        except OSError as error:
            raise HopError(source, rank, _words(error, limits.quiet_s), step=step) from None
        if why := sender.wait():
            raise HopError(rank, target, why, step=step)
        slowest = min(slowest, nbytes / max(seconds, 1e-9))
    return slowest


class _Sender:
    """Sends zeros from a thread, while this member receives."""

    def __init__(self, connection: socket.socket, nbytes: int, quiet_s: float) -> None:
        self._connection = connection
        self._left = nbytes
        self._quiet_s = quiet_s
        self._why = ""
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def wait(self) -> str:
        """Wait until everything is sent; return what went wrong, or an empty text."""
        self._thread.join(self._quiet_s)
        return f"it takes no bytes for {self._quiet_s:g} s" if self._thread.is_alive() else self._why

    def _send(self) -> None:
        piece = memoryview(bytes(_PIECE))
        self._connection.settimeout(self._quiet_s)
        try:
            while self._left:
                self._left -= self._connection.send(piece[: self._left])
        except OSError as error:
            self._why = _words(error, self._quiet_s)


def _receive(connection: socket.socket, nbytes: int, quiet_s: float, until: float) -> float:
    """Return the seconds from the first byte to the last: how long the other member takes to start does not count."""
    piece, left, first_at = bytearray(_PIECE), nbytes, 0.0
    connection.settimeout(quiet_s)
    while left:
        try:
            count = connection.recv_into(piece, min(left, _PIECE))
        except OSError as error:
            raise OSError(0, f"{_words(error, quiet_s)}, after {nbytes - left} of {nbytes} bytes") from None
        if not count:
            raise OSError(0, f"the connection ended after {nbytes - left} of {nbytes} bytes")
        first_at, left = first_at or time.monotonic(), left - count
        if left and time.monotonic() > until:
            raise OSError(0, f"too slow: {nbytes - left} of {nbytes} bytes within the time limit")
    return time.monotonic() - first_at


def _words(error: OSError, quiet_s: float) -> str:
    quiet = isinstance(error, (TimeoutError, socket.timeout))
    return f"nothing passed for {quiet_s:g} s" if quiet else words_of(error)
