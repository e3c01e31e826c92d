"""Which ports a cluster gets: those it had, where they are free; others where not, and that is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import anyio

from raylaunch.cluster.ports import (
    LOOPBACK,
    RAY_PORTS,
    free_ports,
    holder,
    is_free,
    ray_worker_ranges,
    worker_range,
)
from raylaunch.errors import ConflictError

_POLL_S = 0.05


def ray_ports(
    had: Mapping[str, int], *, say: Callable[[str], None], avoid: tuple[int, ...], address: str = LOOPBACK
) -> dict[str, int]:
    """Return ports for a Ray node that is about to start.

    Args:
        had: Its ports of the last time, or empty.
        say: Is told which of them somebody else has taken meanwhile.
        avoid: Ports that are promised to others (the controller's).
        address: Where they must be free.

    Raises:
        ClusterStartError: not enough ports are free.
    """
    ports = {name: had[name] for name in RAY_PORTS if _still_free(had, name, say, address)}
    missing = [name for name in RAY_PORTS if name not in ports]
    ports |= zip(missing, free_ports(len(missing), avoid=(*avoid, *had.values()), address=address), strict=True)
    first, last = had.get("worker_min", 0), had.get("worker_max", 0)
    others = ray_worker_ranges()
    crossed = any(other.start <= last and first < other.stop for other in others)
    if not first or crossed or any(first <= port <= last for port in avoid):
        block = worker_range(avoid=(*avoid, *ports.values()), taken=others, free=lambda port: is_free(port, address))
        first, last = block.start, block.stop - 1
    return ports | {"worker_min": first, "worker_max": last}


def _still_free(had: Mapping[str, int], name: str, say: Callable[[str], None], address: str = LOOPBACK) -> bool:
    if name not in had:
        return False
    if is_free(had[name], address):
        return True
    say(f"port {had[name]} ({name}) is taken by {holder(had[name])}; another one is used")
    return False


def controller_port(
    had: Mapping[str, int], *, fixed: int | None, say: Callable[[str], None], avoid: tuple[int, ...]
) -> int:
    """Return the port for a controller about to start: the one that the spec fixes, else its last, else a free one.

    Raises:
        ConflictError: the spec fixes a port that somebody else has.
    """
    if fixed is not None:
        if not is_free(fixed):
            msg = f"port {fixed} is taken by {holder(fixed)}, and cluster.yaml fixes it for the controller"
            raise ConflictError(msg, hint=f"end that process, or change or remove port: {fixed} in cluster.yaml")
        return fixed
    if _still_free(had, "controller", say):
        return had["controller"]
    return free_ports(1, avoid=(*avoid, *had.values()))[0]


async def wait_free(ports: Mapping[str, int], *, limit_s: float) -> tuple[str, ...]:
    """Wait until a cluster's ports are free; return in words which are not after `limit_s` seconds, and why."""
    left = {name: port for name, port in ports.items() if not (name.startswith("worker_") or is_free(port))}
    with anyio.move_on_after(limit_s):
        while left:
            await anyio.sleep(_POLL_S)
            left = {name: port for name, port in left.items() if not is_free(port)}
    return tuple(f"port {port} ({name}) is taken by {holder(port)}" for name, port in left.items())
