"""Programs on several hosts meet over TCP: each connects to every other, from and to the addresses that were chosen.

Both directions of each pair are tried, for a firewall may stand in one of them only. What cannot be reached is said.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

_TRY_S = 3.0
"""How long one attempt to connect may take."""
_ANSWER_S = 5.0
"""How long the answer to the first words may take."""
_PAUSE_S = 0.2
_LINE_BYTES = 4096


class Member(NamedTuple):
    """One of those who meet: its host's name, and where it listens."""

    host: str
    address: str
    port: int


class UnmetError(Exception):
    """Not all have met: which hosts could not be reached and why, and which did not come."""

    def __init__(self, unreached: dict[str, str], absent: list[str]) -> None:
        super().__init__("not all have met")
        self.unreached = unreached
        self.absent = absent


def listen(member: Member) -> socket.socket:
    """Listen where a member does, on that one address."""
    family = socket.AF_INET6 if ":" in member.address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((member.address, member.port))
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener


class Meeting:
    """The connections of one member with all others.

    Args:
        run: names the meeting; who says another word is a stranger.
        rank: which of the members this is.
        members: all, the same for everyone.
        listener: where this one listens.
    """

    def __init__(self, run: str, rank: int, members: list[Member], listener: socket.socket) -> None:
        self._run = run
        self._rank = rank
        self._members = members
        self._listener = listener
        self._over = threading.Event()
        self._unreached: dict[int, str] = {}
        self.out: dict[int, socket.socket] = {}
        """The connection to each other member."""
        self.came: dict[int, socket.socket] = {}
        """The connection that each other member has made to this one."""

    def meet(self, limit_s: float) -> None:
        """Connect to everybody, and wait until everybody has connected.

        Raises:
            UnmetError: after `limit_s` seconds somebody is missing.
        """
        until = time.monotonic() + limit_s
        others = [rank for rank in range(len(self._members)) if rank != self._rank]
        threads = [threading.Thread(target=self._accept, args=(until,), daemon=True)]
        threads += [threading.Thread(target=self._reach, args=(rank, until), daemon=True) for rank in others]
        for thread in threads:
            thread.start()
        while time.monotonic() < until and not (len(self.out) == len(self.came) == len(others)):
            time.sleep(0.02)
        self._over.set()
        for thread in threads[1:]:
            thread.join(_TRY_S + _ANSWER_S)
        unreached = {self._members[rank].host: why for rank, why in self._unreached.items() if rank not in self.out}
        absent = [self._members[rank].host for rank in others if rank not in self.came]
        if unreached or absent:
            raise UnmetError(unreached, absent)

    def tell(self, words: dict[str, Any]) -> None:
        """Say something to everybody."""
        for connection in self.out.values():
            connection.sendall(json.dumps(words).encode() + b"\n")

    def hear(self, limit_s: float) -> dict[int, dict[str, Any]]:
        """Return what everybody says, by rank.

        Raises:
            UnmetError: somebody has gone, or says nothing for `limit_s` seconds.
        """
        said: dict[int, dict[str, Any]] = {}
        for rank, connection in self.came.items():
            connection.settimeout(limit_s)
            try:
                said[rank] = json.loads(_line(connection))
            except (OSError, ValueError):
                raise UnmetError({}, [self._members[rank].host]) from None
        return said

    def close(self) -> None:
        """Close all connections."""
        self._over.set()
        for connection in (*self.out.values(), *self.came.values(), self._listener):
            connection.close()

    def _accept(self, until: float) -> None:
        self._listener.settimeout(_PAUSE_S)
        while not self._over.is_set() and time.monotonic() < until:
            with suppress(OSError):
                connection, _ = self._listener.accept()
                threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        connection.settimeout(_ANSWER_S)
        try:
            run, sender = _line(connection).split()
            if run != self._run or not 0 <= int(sender) < len(self._members):
                connection.close()
                return
            connection.sendall(b"welcome\n")
        except (OSError, ValueError):
            connection.close()
            return
        self.came[int(sender)] = connection

    def _reach(self, rank: int, until: float) -> None:
        while rank not in self.out and time.monotonic() < until and not self._over.is_set():
            self._try(rank)

    def _try(self, rank: int) -> None:
        try:
            self.out[rank] = self._connect(self._members[rank])
        except OSError as error:
            self._unreached[rank] = words_of(error)
            time.sleep(_PAUSE_S)

    def _connect(self, other: Member) -> socket.socket:
        """Connect from the address that was chosen here, so that no other interface serves in its place."""
        connection = socket.socket(self._listener.family, socket.SOCK_STREAM)
        try:
            connection.settimeout(_TRY_S)
            connection.bind((self._members[self._rank].address, 0))
            _named(f"no answer within {_TRY_S:g} s", lambda: connection.connect((other.address, other.port)))
            connection.sendall(f"{self._run} {self._rank}\n".encode())
            connection.settimeout(_ANSWER_S)
            _named("it takes the connection and says nothing", lambda: _line(connection))
        except OSError:
            connection.close()
            raise
        return connection


def words_of(error: OSError) -> str:
    """Return what went wrong with a connection."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def _named(silence: str, call: Callable[[], object]) -> None:
    try:
        call()
    except TimeoutError:
        raise OSError(0, silence) from None
    except socket.timeout:  # noqa: UP041 -- another class before Python 3.10, which jobs may have
        raise OSError(0, silence) from None


def _line(connection: socket.socket) -> str:
    """Read one line, and nothing beyond it."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > _LINE_BYTES:
            raise ConnectionResetError(0, "it closed the connection")
        line += byte
    return line.decode("ascii").strip()
