"""Programs on several hosts meet over TCP: each connects to every other, from and to the addresses that were chosen.

Both directions of each pair are tried, for a firewall may block only one. The result lists what cannot be reached.
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
    """One program: its host's name, and where it listens."""

    host: str
    address: str
    port: int


class RendezvousError(Exception):
    """Not all members connected: which hosts could not be reached and why, and which did not connect."""

    def __init__(self, unreachable: dict[str, str], absent: list[str]) -> None:
        super().__init__("not all members connected")
        self.unreachable = unreachable
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


class Rendezvous:
    """The connections of one member with all others.

    Args:
        run: name of this run; a connection that sends another one is rejected.
        rank: which of the members this is.
        members: all, the same for everyone.
        listener: where this one listens.
    """

    def __init__(self, run: str, rank: int, members: list[Member], listener: socket.socket) -> None:
        self._run = run
        self._rank = rank
        self._members = members
        self._listener = listener
        self._closed = threading.Event()
        self._unreached: dict[int, str] = {}
        self.outgoing: dict[int, socket.socket] = {}
        """The connection to each other member."""
        self.incoming: dict[int, socket.socket] = {}
        """The connection that each other member has made to this one."""

    def meet(self, limit_s: float) -> None:
        """Connect to all members, and wait until all have connected.

        Raises:
            UnmetError: after `limit_s` seconds a member is missing.
        """
        until = time.monotonic() + limit_s
        others = [rank for rank in range(len(self._members)) if rank != self._rank]
        threads = [threading.Thread(target=self._accept, args=(until,), daemon=True)]
        threads += [threading.Thread(target=self._connect_until, args=(rank, until), daemon=True) for rank in others]
        for thread in threads:
            thread.start()
        while time.monotonic() < until and not (len(self.outgoing) == len(self.incoming) == len(others)):
            time.sleep(0.02)
        self._closed.set()
        for thread in threads[1:]:
            thread.join(_TRY_S + _ANSWER_S)
        unreachable = {
            self._members[rank].host: why for rank, why in self._unreached.items() if rank not in self.outgoing
        }
        absent = [self._members[rank].host for rank in others if rank not in self.incoming]
        if unreachable or absent:
            raise RendezvousError(unreachable, absent)

    def send_all(self, message: dict[str, Any]) -> None:
        """Send a message to all other members."""
        for connection in self.outgoing.values():
            connection.sendall(json.dumps(message).encode() + b"\n")

    def receive_all(self, limit_s: float) -> dict[int, dict[str, Any]]:
        """Return the message of each other member, by rank.

        Raises:
            UnmetError: a member disconnected, or sent nothing for `limit_s` seconds.
        """
        answers: dict[int, dict[str, Any]] = {}
        for rank, connection in self.incoming.items():
            connection.settimeout(limit_s)
            try:
                answers[rank] = json.loads(_line(connection))
            except (OSError, ValueError):
                raise RendezvousError({}, [self._members[rank].host]) from None
        return answers

    def close(self) -> None:
        """Close all connections."""
        self._closed.set()
        for connection in (*self.outgoing.values(), *self.incoming.values(), self._listener):
            connection.close()

    def _accept(self, until: float) -> None:
        self._listener.settimeout(_PAUSE_S)
        while not self._closed.is_set() and time.monotonic() < until:
            with suppress(OSError):
                connection, _ = self._listener.accept()
                threading.Thread(target=self._handshake, args=(connection,), daemon=True).start()

    def _handshake(self, connection: socket.socket) -> None:
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
        self.incoming[int(sender)] = connection

    def _connect_until(self, rank: int, until: float) -> None:
        while rank not in self.outgoing and time.monotonic() < until and not self._closed.is_set():
            self._try_connect(rank)

    def _try_connect(self, rank: int) -> None:
        try:
            self.outgoing[rank] = self._connect(self._members[rank])
        except OSError as error:
            self._unreached[rank] = error_text(error)
            time.sleep(_PAUSE_S)

    def _connect(self, other: Member) -> socket.socket:
        """Connect from the address that was chosen here, so that no other interface serves in its place."""
        connection = socket.socket(self._listener.family, socket.SOCK_STREAM)
        try:
            connection.settimeout(_TRY_S)
            connection.bind((self._members[self._rank].address, 0))
            _name_timeout(f"no answer within {_TRY_S:g} s", lambda: connection.connect((other.address, other.port)))
            connection.sendall(f"{self._run} {self._rank}\n".encode())
            connection.settimeout(_ANSWER_S)
            _name_timeout("it accepts the connection but sends nothing", lambda: _line(connection))
        except OSError:
            connection.close()
            raise
        return connection


def error_text(error: OSError) -> str:
    """Return what went wrong with a connection."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def _name_timeout(timeout_text: str, call: Callable[[], object]) -> None:
    try:
        call()
    except TimeoutError:
        raise OSError(0, timeout_text) from None
    except socket.timeout:  # noqa: UP041 -- another class before Python 3.10, which jobs may have
        raise OSError(0, timeout_text) from None


def _line(connection: socket.socket) -> str:
    """Read one line, and nothing beyond it."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > _LINE_BYTES:
            raise ConnectionResetError(0, "it closed the connection")
        line += byte
    return line.decode("ascii").strip()
