"""A ring all-reduce over TCP connections, in the standard library, with numbers that prove themselves.

Every member holds the same lanes of 64 bits, times a factor of its own; at the end all hold their sum. Lanes are added
as one large integer, which is as quick as memory and needs no library.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from array import array
from typing import NamedTuple

from raylaunch.runner.meeting import words_of

_LANE = 8
_PATTERN_LANES = 128 * 1024
_PIECE = 1024 * 1024


class HopError(Exception):
    """Between two neighbours of the ring it went wrong; the lowest `step` of all is where it began."""

    def __init__(self, sender: int, receiver: int, why: str, *, step: int) -> None:
        super().__init__(why)
        self.sender = sender
        self.receiver = receiver
        self.why = why
        self.step = step


class Neighbours(NamedTuple):
    """A member's place in the ring, and its connections to the next and from the one before."""

    rank: int
    size: int
    right: socket.socket
    left: socket.socket


class Limits(NamedTuple):
    """How long nothing may pass, and how long the whole may take, in seconds."""

    quiet_s: float
    whole_s: float


def lanes(run: str, factor: int, size: int) -> bytes:
    """Return `size` bytes of lanes that everybody knows, times `factor`."""
    noise = array("I", hashlib.shake_256(run.encode()).digest(4 * _PATTERN_LANES))
    pattern = array("Q", [value * factor for value in noise]).tobytes()
    return (pattern * (size // len(pattern) + 1))[:size]


def all_reduce(mine: bytes, ring: Neighbours, limits: Limits) -> tuple[bytes, float]:
    """Return the sum of what all hold, and the seconds in which bytes were under way.

    Raises:
        HopError: nothing came or went for too long, or a neighbour has gone.
    """
    size, rank = ring.size, ring.rank
    chunks = split(mine, size)
    until, under_way = time.monotonic() + limits.whole_s, 0.0
    for step in range(2 * (size - 1)):
        adds = step < size - 1
        first = rank - step if adds else rank + 1 - (step - size + 1)
        given, taken = first % size, (first - 1) % size
        exchange = _Exchange(ring, limits.quiet_s, until, step)
        came = exchange.swap(chunks[given], len(chunks[taken]))
        under_way += exchange.seconds
        chunks[taken] = _sum(chunks[taken], came) if adds else came
    return b"".join(chunks), under_way


def split(data: bytes, count: int) -> list[bytes]:
    """Cut data into so many parts, at lanes."""
    part = -(-len(data) // (count * _LANE)) * _LANE
    return [data[index * part : (index + 1) * part] for index in range(count)]


def _sum(one: bytes, other: bytes) -> bytes:
    total = int.from_bytes(one, "little") + int.from_bytes(other, "little")
    return (total & ((1 << 8 * len(one)) - 1)).to_bytes(len(one), "little")


class _Exchange:
    """One step of the ring: bytes go to the right while others come from the left."""

    def __init__(self, ring: Neighbours, quiet_s: float, until: float, step: int) -> None:
        self._ring = ring
        self._quiet_s = quiet_s
        self._until = until
        self._step = step
        self._failed: HopError | None = None
        self.seconds = 0.0
        """From the first byte that came to the last: what the neighbour computes meanwhile does not count."""

    def swap(self, given: bytes, count: int) -> bytes:
        sending = threading.Thread(target=self._send, args=(given,), daemon=True)
        sending.start()
        came = self._receive(count)
        sending.join(self._quiet_s)
        if sending.is_alive():
            self._fail_right(f"it takes no bytes for {self._quiet_s:g} s")
        if self._failed is not None:
            raise self._failed
        return came

    def _send(self, data: bytes) -> None:
        view, done = memoryview(data), 0
        self._ring.right.settimeout(self._quiet_s)
        try:
            while done < len(view):
                done += self._ring.right.send(view[done : done + _PIECE])
        except OSError as error:
            self._fail_right(self._words(error, done, len(view)))

    def _receive(self, count: int) -> bytes:
        data, done, first_at = bytearray(count), 0, 0.0
        self._ring.left.settimeout(self._quiet_s)
        while done < count:
            try:
                got = self._ring.left.recv_into(memoryview(data)[done:], count - done)
            except OSError as error:
                raise self._from_left(self._words(error, done, count)) from None
            if not got:
                why = f"the connection ended after {done} of {count} bytes"
                raise self._from_left(why)
            first_at = first_at or time.monotonic()
            done += got
            if time.monotonic() > self._until:
                why = f"too slow: {done} of {count} bytes when the time was over"
                raise self._from_left(why)
        self.seconds = time.monotonic() - first_at if count else 0.0
        return bytes(data)

    def _words(self, error: OSError, done: int, count: int) -> str:
        quiet = isinstance(error, (TimeoutError, socket.timeout))
        why = f"nothing passed for {self._quiet_s:g} s" if quiet else words_of(error)
        return f"{why}, after {done} of {count} bytes"

    def _from_left(self, why: str) -> HopError:
        ring = self._ring
        return self._failed or HopError((ring.rank - 1) % ring.size, ring.rank, why, step=self._step)

    def _fail_right(self, why: str) -> None:
        ring = self._ring
        self._failed = HopError(ring.rank, (ring.rank + 1) % ring.size, why, step=self._step)
