"""What a lane needs where it is not told how the `ssh` that is installed connects, or where that gets no connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from raylaunch.cluster.client_record import ClientRecord, load_client, load_tunnel
from raylaunch.cluster.home import cluster_paths
from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.ssh.dial import Call, dial
from raylaunch.cluster.ssh.machine import Machine, machine
from raylaunch.cluster.ssh.openssh import command
from raylaunch.cluster.ssh.words import to_port
from raylaunch.cluster.targets import target_of
from raylaunch.errors import ClusterDownError

OnData = Callable[[bytes], None]


def installed(name: str) -> list[str]:
    """Return the command of the `ssh` that is installed, to the cluster's controller; nothing where there is none.

    Raises:
        RaylaunchError: the cluster is not known here, or the SSH configuration cannot be read.
    """
    client = _known(name)
    words = command(target_of(client.spec.host_specs()[0]))
    return to_port(words, LOOPBACK, _port(name, client)) if words else []


@asynccontextmanager
async def connected(name: str) -> AsyncIterator[Callable[[OnData], AbstractAsyncContextManager[Call]]]:
    """Connect to the cluster's head, and yield what makes connections to its controller.

    Raises:
        RaylaunchError: the cluster is not known here, or its head cannot be reached.
    """
    client = _known(name)
    async with machine(target_of(client.spec.host_specs()[0])) as head:
        yield partial(_dialled, head, _port(name, client))


@asynccontextmanager
async def _dialled(head: Machine, port: int, on_data: OnData) -> AsyncIterator[Call]:
    yield await dial(head, LOOPBACK, port, on_data)


def _known(name: str) -> ClientRecord:
    client = load_client(cluster_paths(name))
    if client is None:
        msg = f"cluster {name} is not known on this machine"
        raise ClusterDownError(msg)
    return client


def _port(name: str, client: ClientRecord) -> int:
    """The tunnel has asked the head for it; what was known when the cluster came up may be over."""
    tunnel = load_tunnel(cluster_paths(name))
    return (tunnel.head_ports if tunnel else {}).get("controller") or client.head_ports["controller"]
