"""PyTorch's own all-reduce between members that have met: NCCL where all have real GPUs, Gloo else."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import time
from datetime import timedelta
from typing import Any

_LIMIT_S = 45
_VALUES = 1024


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
    """Let NCCL and Gloo use this interface, unless the environment says another."""
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
    meeting = distributed.TCPStore(
        address, port, world_size=size, is_master=listener is not None, timeout=limit, wait_for_workers=False, **serves
    )
    distributed.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=limit)
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
