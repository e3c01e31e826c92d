"""``runner.pyz --together PLAN``: one of several programs that check the cluster's network between them.

`up` runs one on each host with GPUs. They connect at the chosen addresses, each to every other and in both directions,
because a firewall may block only one. Then they run PyTorch's all-reduce and check its numbers, or exchange bytes pair
by pair where one has no PyTorch, and print one line of JSON: the result, or between which of them it failed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

OPTION = "--together"
MARK = "raylaunch-together "
"""Prefix of the line with the result."""
_CHUNK = 1024 * 1024
_LIMIT_S = 45
_VALUES = 1024
_HEAR_S = 15.0
_TORCH_S = 75.0
_TRY_S = 3.0
"""How long one attempt to connect may take."""
_ANSWER_S = 5.0
"""How long the answer to the first words may take."""
_PAUSE_S = 0.2
_LINE_BYTES = 4096
_TIMEOUTS = (TimeoutError, socket.timeout)  # two classes before Python 3.10, which jobs may have


def main(arguments: Sequence[str]) -> int:
    """Take part in the check that the argument after `OPTION` describes; exits with its status."""
    ended = NetworkCheck(json.loads(arguments[1])).run()
    sys.stdout.write(f"\n{MARK}{json.dumps(ended)}\n")
    sys.stdout.flush()
    os._exit(0 if ended["kind"] == "done" else 1)  # a thread that hangs in PyTorch must not keep it


class NetworkCheck:
    """One member.

    Args:
        plan: ``run`` (a word of this run's own), ``rank``, ``members`` (host, address, port of each), ``interface`` of
            this one, ``bytes``, ``meet_s``, ``quiet_s``, ``whole_s``.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._members = [Member(*one) for one in plan["members"]]
        self._rank: int = plan["rank"]
        self._size = len(self._members)

    def run(self) -> dict[str, Any]:
        """Run the check and return its result."""
        own_member = self._members[self._rank]
        choose_interface(self._plan["interface"])
        try:
            listener = listen(own_member)
        except OSError as error:
            return {"kind": "listen", "why": error_text(error)}
        rendezvous = Rendezvous(self._plan["run"], self._rank, self._members, listener)
        try:
            return self._check(rendezvous)
        except RendezvousError as error:
            return {"kind": "unmet", "unreached": error.unreachable, "absent": error.absent}
        except HopError as error:
            hop = [self._members[error.sender].host, self._members[error.receiver].host]
            return {"kind": "hop", "hop": hop, "why": error.why, "step": error.step}
        finally:
            rendezvous.close()

    def _check(self, rendezvous: Rendezvous) -> dict[str, Any]:
        rendezvous.meet(self._plan["meet_s"])
        store, port = None, 0
        if not self._rank:  # PyTorch's store, on this one address alone
            store = listen(self._members[0]._replace(port=0))
            port = store.getsockname()[1]
        answers = rendezvous.share({**capabilities(), "port": port}, self._plan["meet_s"] + _HEAR_S)
        backend = backend_of(list(answers.values()))
        if backend == "TCP":
            nbytes = max(1, self._plan["bytes"] // (self._size - 1))
            rate = exchange(rendezvous, nbytes, self._plan["quiet_s"], self._plan["whole_s"])
            return {"kind": "done", "over": "TCP", "bytes_per_s": rate}
        return self._all_reduce(backend, (self._members[0].address, answers[0]["port"], store))

    def _all_reduce(self, backend: str, store: tuple[str, int, socket.socket | None]) -> dict[str, Any]:
        """Run it in a thread: one that hangs cannot be interrupted, but it can be abandoned."""
        ended: list[dict[str, Any]] = []

        def work() -> None:
            try:
                seconds = all_reduce(backend, self._rank, self._size, store, self._plan["bytes"])
                ended.append(self._done(backend, seconds))
            except ArithmeticError as error:
                ended.append({"kind": "number", "over": backend, "why": str(error)})
            except Exception as error:  # noqa: BLE001 -- whatever PyTorch raises is the result
                why = " ".join(str(error).split())[:500]
                ended.append({"kind": "torch", "over": backend, "why": f"{type(error).__name__}: {why}"})

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(_TORCH_S)
        return ended[0] if ended else {"kind": "torch", "over": backend, "why": f"no end within {_TORCH_S:g} s"}

    def _done(self, over: str, seconds: float) -> dict[str, Any]:
        """Each member sends and receives 2 (n - 1) / n of the bytes."""
        passed = 2 * (self._size - 1) / self._size * self._plan["bytes"]
        return {"kind": "done", "over": over, "seconds": seconds, "bytes_per_s": passed / max(seconds, 1e-9)}


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


class HopError(Exception):
    """From `sender` to `receiver` the bytes did not pass, in round `step`."""

    def __init__(self, sender: int, receiver: int, why: str, *, step: int) -> None:
        super().__init__(why)
        self.sender = sender
        self.receiver = receiver
        self.why = why
        self.step = step


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
        self.rank = rank
        self.members = members
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
            RendezvousError: after `limit_s` seconds a member is missing.
        """
        until = time.monotonic() + limit_s
        others = [rank for rank in range(len(self.members)) if rank != self.rank]
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
            self.members[rank].host: why for rank, why in self._unreached.items() if rank not in self.outgoing
        }
        absent = [self.members[rank].host for rank in others if rank not in self.incoming]
        if unreachable or absent:
            raise RendezvousError(unreachable, absent)

    def share(self, own: dict[str, Any], limit_s: float) -> dict[int, dict[str, Any]]:
        """Send a message to all other members; return everybody's, by rank.

        Raises:
            RendezvousError: a member disconnected, or sent nothing for `limit_s` seconds.
        """
        answers = {self.rank: own}
        with suppress(OSError):  # who has disconnected is found below
            for connection in self.outgoing.values():
                connection.sendall(json.dumps(own).encode() + b"\n")
        for rank, connection in self.incoming.items():
            connection.settimeout(limit_s)
            try:
                answers[rank] = json.loads(_line(connection))
            except (OSError, ValueError):
                raise RendezvousError({}, [self.members[rank].host]) from None
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
            if run != self._run or not 0 <= int(sender) < len(self.members):
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
            self.outgoing[rank] = self._connect(self.members[rank])
        except OSError as error:
            self._unreached[rank] = error_text(error)
            time.sleep(_PAUSE_S)

    def _connect(self, other: Member) -> socket.socket:
        """Connect from the address that was chosen here, so that no other interface serves in its place."""
        connection = socket.socket(self._listener.family, socket.SOCK_STREAM)
        why = f"no answer within {_TRY_S:g} s"
        try:
            connection.settimeout(_TRY_S)
            connection.bind((self.members[self.rank].address, 0))
            connection.connect((other.address, other.port))
            why = "it accepts the connection but sends nothing"
            connection.sendall(f"{self._run} {self.rank}\n".encode())
            connection.settimeout(_ANSWER_S)
            _line(connection)
        except OSError as error:
            connection.close()
            if isinstance(error, _TIMEOUTS):
                raise OSError(0, why) from None
            raise
        return connection


def exchange(rendezvous: Rendezvous, nbytes: int, quiet_s: float, total_s: float) -> float:
    """Exchange `nbytes` bytes with every other member; return the slowest rate at which they came, in bytes a second.

    Raises:
        HopError: nothing passed for `quiet_s` seconds, all rounds took longer than `total_s`, or a connection ended.
    """
    rank, size = rendezvous.rank, len(rendezvous.members)
    until, slowest = time.monotonic() + total_s, float("inf")
    for step in range(1, size):
        target, source = (rank + step) % size, (rank - step) % size
        sender = _Sender(rendezvous.outgoing[target], nbytes, quiet_s)
        try:
            seconds = _receive(rendezvous.incoming[source], nbytes, quiet_s, until)
        except OSError as error:
            raise HopError(source, rank, _error_text(error, quiet_s), step=step) from None
        if why := sender.wait():
            raise HopError(rank, target, why, step=step)
        slowest = min(slowest, nbytes / max(seconds, 1e-9))
    return slowest


def capabilities() -> dict[str, Any]:
    """Return whether PyTorch can be imported here, and whether it sees a GPU for NCCL."""
    if importlib.util.find_spec("torch") is None:
        return {"torch": False, "cuda": False}
    try:
        torch: Any = importlib.import_module("torch")
        distributed: Any = importlib.import_module("torch.distributed")
        cuda = bool(torch.cuda.is_available() and distributed.is_nccl_available())
        return {"torch": bool(distributed.is_available() and distributed.is_gloo_available()), "cuda": cuda}
    except Exception as error:  # noqa: BLE001 -- a broken PyTorch counts as none
        return {"torch": False, "cuda": False, "why": f"{type(error).__name__}: {error}"}


def backend_of(all_of_them: list[dict[str, Any]]) -> str:
    """Return which way serves for all: ``nccl``, ``gloo``, or ``TCP`` where one has no PyTorch."""
    if not all(one["torch"] for one in all_of_them):
        return "TCP"
    return "nccl" if all(one["cuda"] for one in all_of_them) else "gloo"


def choose_interface(interface: str) -> None:
    """Let NCCL and Gloo use this interface, unless the environment names another."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if interface:
            os.environ.setdefault(name, interface)


def all_reduce(backend: str, rank: int, size: int, store: tuple[str, int, socket.socket | None], nbytes: int) -> float:
    """Reduce `nbytes` bytes twice, and return what the second time took, in seconds.

    Args:
        backend: ``nccl`` or ``gloo``.
        rank: which member this is.
        size: how many there are.
        store: address and port where they agree; and, on the first member, the socket that listens there.
        nbytes: of the numbers.

    Raises:
        ArithmeticError: the sum is not what it must be.
        Exception: whatever PyTorch raises.
    """
    torch: Any = importlib.import_module("torch")
    distributed: Any = importlib.import_module("torch.distributed")
    address, port, listener = store
    limit = timedelta(seconds=_LIMIT_S)
    serves = {"master_listen_fd": os.dup(listener.fileno())} if listener is not None else {}
    rendezvous = distributed.TCPStore(
        address, port, world_size=size, is_master=listener is not None, timeout=limit, wait_for_workers=False, **serves
    )
    distributed.init_process_group(backend, store=rendezvous, rank=rank, world_size=size, timeout=limit)
    device = "cuda:0" if backend == "nccl" else "cpu"
    known = (torch.arange(nbytes // 4, device=device) % _VALUES).to(torch.float32)
    took = 0.0
    for _ in range(2):
        numbers = known * (rank + 1)
        distributed.barrier()
        began = time.monotonic()
        distributed.all_reduce(numbers)
        if backend == "nccl":
            torch.cuda.synchronize()
        took = time.monotonic() - began
        wrong = int((numbers != known * (size * (size + 1) // 2)).sum())
        if wrong:
            msg = f"{wrong} of {nbytes // 4} numbers are wrong"
            raise ArithmeticError(msg)
    distributed.barrier()
    distributed.destroy_process_group()
    return took


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
        return f"it accepted no bytes for {self._quiet_s:g} s" if self._thread.is_alive() else self._why

    def _send(self) -> None:
        chunk = memoryview(bytes(_CHUNK))
        self._connection.settimeout(self._quiet_s)
        try:
            while self._left:
                self._left -= self._connection.send(chunk[: self._left])
        except OSError as error:
            self._why = _error_text(error, self._quiet_s)


def _receive(connection: socket.socket, nbytes: int, quiet_s: float, until: float) -> float:
    """Return the seconds from the first byte to the last: how long the other member takes to start does not count."""
    chunk, left, first_at = bytearray(_CHUNK), nbytes, 0.0
    connection.settimeout(quiet_s)
    while left:
        try:
            count = connection.recv_into(chunk, min(left, _CHUNK))
        except OSError as error:
            raise OSError(0, f"{_error_text(error, quiet_s)}, after {nbytes - left} of {nbytes} bytes") from None
        if not count:
            raise OSError(0, f"the connection ended after {nbytes - left} of {nbytes} bytes")
        first_at, left = first_at or time.monotonic(), left - count
        if left and time.monotonic() > until:
            raise OSError(0, f"too slow: {nbytes - left} of {nbytes} bytes within the time limit")
    return time.monotonic() - first_at


def _error_text(error: OSError, quiet_s: float) -> str:
    return f"nothing passed for {quiet_s:g} s" if isinstance(error, _TIMEOUTS) else error_text(error)


def error_text(error: OSError) -> str:
    """Return what went wrong with a connection."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def _line(connection: socket.socket) -> str:
    """Read one line, and nothing beyond it."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > _LINE_BYTES:
            raise ConnectionResetError(0, "it closed the connection")
        line += byte
    return line.decode("ascii").strip()
