"""Free ports on loopback: distinct, outside the ranges of Ray's workers, and reported by name when taken."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import re
import socket
from collections.abc import Callable, Collection, Iterable, Mapping

import anyio
import psutil

from raylaunch.errors import ClusterStartError, ConflictError
from raylaunch.paths import user_name

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Return whether a name or address is the loopback of this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


RAY_PORTS = (
    "gcs",
    "dashboard",
    "dashboard_agent",
    "dashboard_agent_grpc",
    "metrics",
    "runtime_env_agent",
    "client_server",
    "node_manager",
    "object_manager",
)
"""The ports that a Ray head listens on, in addition to those of its workers."""

# Below the kernel's ephemeral range (from 32768), so that an outgoing connection cannot take a port while Ray is down.
SINGLE_PORTS = range(20000, 26000)
WORKER_BLOCKS = range(26000, 32700)


def worker_ports(cpus: int | None) -> int:
    """Return how many ports the workers of one Ray may need on a machine with `cpus` cores."""
    return max(400, 4 * (cpus or 1))


WORKER_PORTS = worker_ports(os.cpu_count())
"""Each worker and each driver of a Ray takes one."""

_RAYLET_RANGE = re.compile(r"--(min|max)_worker_port=(\d+)")


ANYWHERE = "0.0.0.0"  # noqa: S104 -- checked, never listened on: is the port free on every address?


def is_free(port: int, address: str = LOOPBACK) -> bool:
    """Return whether a program could listen on `port` of `address` (by default loopback) now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections in TIME_WAIT
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_ports(count: int, *, avoid: Collection[int] = (), address: str = LOOPBACK) -> tuple[int, ...]:
    """Return `count` distinct free ports, none of them in `avoid` or in the range where worker ports are chosen.

    They are consecutive where possible, so that one firewall rule can cover them.

    Raises:
        ClusterStartError: there are fewer.
    """
    found: list[int] = []
    start = random.randrange(len(SINGLE_PORTS))  # noqa: S311 -- so that two clusters seldom choose the same; no secret
    for port in (*SINGLE_PORTS[start:], *SINGLE_PORTS[:start]):
        if len(found) == count:
            break
        if port not in avoid and is_free(port, address):
            found.append(port)
    if len(found) < count:
        between = f"between {SINGLE_PORTS.start} and {SINGLE_PORTS.stop - 1}"
        msg = f"only {len(found)} of the {count} ports needed are free {between}"
        raise ClusterStartError(msg, hint="end what holds them: ss -ltnp", step="ports")
    return tuple(found)


def worker_range(
    *, avoid: Collection[int] = (), taken: Iterable[range] | None = None, free: Callable[[int], bool] = is_free
) -> range:
    """Return a free block of `WORKER_PORTS` ports for the workers of one Ray.

    Args:
        avoid: ports that must not lie in it.
        taken: blocks of other Rays on this machine; by default those that are found.
        free: returns whether a port is free.

    Raises:
        ClusterStartError: no block is free.
    """
    others = list(ray_worker_ranges() if taken is None else taken)
    starts = list(range(WORKER_BLOCKS.start, WORKER_BLOCKS.stop - WORKER_PORTS, 100))
    random.shuffle(starts)
    for start in starts:
        block = range(start, start + WORKER_PORTS)
        if any(_overlap(block, other) for other in others) or any(port in block for port in avoid):
            continue
        if all(free(port) for port in block):
            return block
    msg = f"no {WORKER_PORTS} consecutive ports are free between {WORKER_BLOCKS.start} and {WORKER_BLOCKS.stop - 1}"
    raise ClusterStartError(msg, hint="another Ray on this machine may hold them: ss -ltnp", step="ports")


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def ray_worker_ranges() -> list[range]:
    """Return the worker port ranges of all Rays that run on this machine, as their raylets' arguments state them."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] != "raylet":
            continue
        limits = {key: int(value) for key, value in _RAYLET_RANGE.findall(" ".join(process.info["cmdline"] or ()))}
        if limits.get("min") and limits.get("max"):
            found.append(range(limits["min"], limits["max"] + 1))
    return found


def holder(port: int) -> str:
    """Return who listens on `port`, as ``pid 4711 (python3, user anna)``, or that this is unknown."""
    try:
        listening = psutil.net_connections(kind="inet")
    except psutil.AccessDenied:  # macOS shows them only to root
        listening = []
    for connection in listening:
        if connection.status != psutil.CONN_LISTEN or not connection.laddr or not connection.pid:
            continue
        if connection.laddr.port == port:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(connection.pid)
                return f"pid {process.pid} ({process.name()}, user {user_name(process.uids().real)})"
            return f"pid {connection.pid}"
    return "a process of another user"


def own_addresses() -> tuple[str, ...]:
    """Return the IP addresses of this machine that others may reach it at."""
    found = [one.address for each in psutil.net_if_addrs().values() for one in each if one.family in _FAMILIES]
    return tuple(text for text in found if "%" not in text and not ipaddress.ip_address(text).is_loopback)


_POLL_S = 0.05


def ray_ports(
    had: Mapping[str, int], *, on_taken: Callable[[str], None], avoid: tuple[int, ...], address: str = LOOPBACK
) -> dict[str, int]:
    """Return ports for a Ray node that is about to start.

    Args:
        had: its previous ports, or empty.
        on_taken: called with a message for each that another process has taken meanwhile.
        avoid: ports that are reserved for others (the controller's).
        address: where they must be free.

    Raises:
        ClusterStartError: not enough ports are free.
    """
    ports = {name: had[name] for name in RAY_PORTS if _still_free(had, name, on_taken, address)}
    missing = [name for name in RAY_PORTS if name not in ports]
    ports |= zip(missing, free_ports(len(missing), avoid=(*avoid, *had.values()), address=address), strict=True)
    first, last = had.get("worker_min", 0), had.get("worker_max", 0)
    others = ray_worker_ranges()
    crossed = any(_overlap(range(first, last + 1), other) for other in others)
    if not first or crossed or any(first <= port <= last for port in avoid):
        block = worker_range(avoid=(*avoid, *ports.values()), taken=others, free=lambda port: is_free(port, address))
        first, last = block.start, block.stop - 1
    return ports | {"worker_min": first, "worker_max": last}


def _still_free(had: Mapping[str, int], name: str, on_taken: Callable[[str], None], address: str = LOOPBACK) -> bool:
    if name not in had:
        return False
    if is_free(had[name], address):
        return True
    on_taken(f"port {had[name]} ({name}) is taken by {holder(had[name])}; using another one")
    return False


def controller_port(
    had: Mapping[str, int], *, fixed: int | None, on_taken: Callable[[str], None], avoid: tuple[int, ...]
) -> int:
    """Return the port for a controller about to start: the one that the spec fixes, else its last, else a free one.

    Raises:
        ConflictError: the spec fixes a port that another process uses.
    """
    if fixed is not None:
        if not is_free(fixed):
            msg = f"port {fixed} is taken by {holder(fixed)}, but cluster.yaml sets it for the controller"
            raise ConflictError(msg, hint=f"end that process, or change or remove port: {fixed} in cluster.yaml")
        return fixed
    if _still_free(had, "controller", on_taken):
        return had["controller"]
    return free_ports(1, avoid=(*avoid, *had.values()))[0]


async def wait_free(ports: Mapping[str, int], *, limit_s: float) -> tuple[str, ...]:
    """Wait until a cluster's ports are free; return a message for each that is not after `limit_s` seconds."""
    left = {name: port for name, port in ports.items() if not (name.startswith("worker_") or is_free(port))}
    with anyio.move_on_after(limit_s):
        while left:
            await anyio.sleep(_POLL_S)
            left = {name: port for name, port in left.items() if not is_free(port)}
    return tuple(f"port {port} ({name}) is taken by {holder(port)}" for name, port in left.items())
