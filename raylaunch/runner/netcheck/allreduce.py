"""``runner.pyz --together PLAN``: one of several programs that check the cluster's network between them.

`up` runs one on each host with GPUs. They connect at the chosen addresses, run PyTorch's all-reduce and check its
numbers, or exchange bytes pair by pair where one has no PyTorch, and print one line of JSON: the result, or between
which of them it failed.
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
from datetime import timedelta
from typing import Any, NamedTuple

from raylaunch.runner.netcheck.rendezvous import Member, Rendezvous, RendezvousError, error_text, listen

OPTION = "--together"
MARK = "raylaunch-together "
"""Prefix of the line with the result."""
_CHUNK = 1024 * 1024
_LIMIT_S = 45
_VALUES = 1024
_HEAR_S = 15.0
_TORCH_S = 75.0


def main(arguments: Sequence[str]) -> int:
    """Take part in the check that the argument after `OPTION` describes; returns the exit status."""
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
        store, port = self._store()
        own = {**capabilities(), "port": port}
        answers = self._share_capabilities(rendezvous, own)
        backend = backend_of(list(answers.values()))
        if backend == "TCP":
            return self._exchange(rendezvous)
        return self._all_reduce(backend, (self._members[0].address, answers[0]["port"], store))

    def _store(self) -> tuple[socket.socket | None, int]:
        """Listen where PyTorch's store will, on the first member's chosen address alone."""
        if self._rank:
            return None, 0
        listener = listen(self._members[0]._replace(port=0))
        return listener, int(listener.getsockname()[1])

    def _share_capabilities(self, rendezvous: Rendezvous, own: dict[str, Any]) -> dict[int, dict[str, Any]]:
        try:
            rendezvous.send_all(own)
        except OSError:
            raise RendezvousError({}, []) from None
        return {**rendezvous.receive_all(self._plan["meet_s"] + _HEAR_S), self._rank: own}

    def _exchange(self, rendezvous: Rendezvous) -> dict[str, Any]:
        limits = ExchangeLimits(self._plan["quiet_s"], self._plan["whole_s"])
        nbytes = max(1, self._plan["bytes"] // (self._size - 1))
        rate = exchange(rendezvous, self._rank, self._size, nbytes, limits)
        return {"kind": "done", "over": "TCP", "bytes_per_s": rate}

    def _all_reduce(self, backend: str, store: tuple[str, int, socket.socket | None]) -> dict[str, Any]:
        """Do it in a thread: what hangs in there cannot be interrupted, but left behind."""
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
        """Each member sends, and receives, 2 (n - 1) / n of the whole."""
        passed = 2 * (self._size - 1) / self._size * self._plan["bytes"]
        return {"kind": "done", "over": over, "seconds": seconds, "bytes_per_s": passed / max(seconds, 1e-9)}


class HopError(Exception):
    """From `sender` to `receiver` the bytes did not pass, in round `step`."""

    def __init__(self, sender: int, receiver: int, why: str, *, step: int) -> None:
        super().__init__(why)
        self.sender = sender
        self.receiver = receiver
        self.why = why
        self.step = step


class ExchangeLimits(NamedTuple):
    """How long nothing may pass, and how long all rounds may take, in seconds."""

    quiet_s: float
    total_s: float


def exchange(rendezvous: Rendezvous, rank: int, size: int, nbytes: int, limits: ExchangeLimits) -> float:
    """Exchange `nbytes` bytes with every other member; return the slowest rate at which they came, in bytes a second.

    Raises:
        HopError: nothing passed for `limits.quiet_s`, the time is up, or a connection ended.
    """
    until, slowest = time.monotonic() + limits.total_s, float("inf")
    for step in range(1, size):
        target, source = (rank + step) % size, (rank - step) % size
        sender = _Sender(rendezvous.outgoing[target], nbytes, limits.quiet_s)
        try:
            seconds = _receive(rendezvous.incoming[source], nbytes, limits.quiet_s, until)
        except OSError as error:
            raise HopError(source, rank, _error_text(error, limits.quiet_s), step=step) from None
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
    except Exception as error:  # noqa: BLE001 -- a broken PyTorch is none, whatever it raises
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
    quiet = isinstance(error, (TimeoutError, socket.timeout))
    return f"nothing passed for {quiet_s:g} s" if quiet else error_text(error)
