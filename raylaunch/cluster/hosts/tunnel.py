"""The tunnel: a background process that keeps a cluster's controller and Ray reachable on loopback here.

``python -m raylaunch.cluster.reach.tunnel NAME``. Any command that needs it starts it; a lock ensures that there is one
for each cluster. A lost connection is made again, with the same local ports, until the cluster is taken down.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import anyio

from raylaunch.cluster.client_record import (
    ClientRecord,
    TunnelRecord,
    load_client,
    load_tunnel,
    save_tunnel,
    tunnel_file,
)
from raylaunch.cluster.local.health import http_request
from raylaunch.cluster.ports import LOOPBACK, free_ports, is_free
from raylaunch.cluster.probe.choices import target_of
from raylaunch.cluster.processes import identify
from raylaunch.errors import HostLostError, RaylaunchError
from raylaunch.files import try_lock
from raylaunch.paths import ClusterPaths, cluster_paths
from raylaunch.ssh.host import SSHHost, machine
from raylaunch.ssh.resolve import command
from raylaunch.version import __version__

_log = logging.getLogger("raylaunch.cluster.reach.tunnel")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0
_KEEPALIVE_S, _KEEPALIVES_MISSED = 2, 3
_BEAT_S = 1.0
_SLEPT_S = 8.0
"""Between two heartbeats: this machine slept, or the process was stopped. The connection is then closed at once."""
_PORTS = ("controller", "dashboard", "gcs")
_LOOK_S = 20.0
_LOST = "are you on its network or VPN? Run the same command again in a few seconds"

Address = tuple[str, int]


class Tunnel:
    """The tunnel process: one head, up to three ports."""

    def __init__(self, paths: ClusterPaths) -> None:
        self._paths = paths
        had = load_tunnel(paths)
        own = identify(os.getpid(), sys.argv)
        if own is None:  # a process can always inspect itself
            raise AssertionError
        ports = {key: had.ports[key] for key in _PORTS if had and key in had.ports and is_free(had.ports[key])}
        missing = [key for key in _PORTS if key not in ports]
        ports |= zip(missing, free_ports(len(missing), avoid=tuple(ports.values())), strict=True)
        self._remote: dict[str, Address] = {}
        self._woken = anyio.Event()
        self._record = TunnelRecord(process=own, ports=ports, at=time.time(), version=__version__)

    async def run(self) -> None:
        """Keep the tunnel open until the cluster is taken down."""
        self._save(up=False)
        pause = _FIRST_PAUSE_S
        while (client := load_client(self._paths)) is not None and client.wanted == "running":
            try:
                async with machine(target_of(client.spec.host_specs()[0])) as head:
                    head.keep_alive(every_s=_KEEPALIVE_S, missed=_KEEPALIVES_MISSED)
                    await self._open(head, client)
                    self._save(up=True)
                    _log.info("up: %s", self._record.ports)
                    pause = _FIRST_PAUSE_S
                    await self._until_lost(head, client)
                    why = f"lost the connection to {head.name}; reconnecting"
                    self._save(up=False, why=why, hint=_LOST, code=HostLostError.code)  # before the orderly close
            except RaylaunchError as error:
                self._save(up=False, why=error.message, hint=error.hint, code=error.code)
            _log.info("down: %s", self._record.why)
            with anyio.move_on_after(pause):
                await self._woken.wait()
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def beat(self) -> None:
        """Touch the heartbeat file every second; after a pause, make the connection again."""
        before = time.time()
        while True:
            await anyio.sleep(_BEAT_S)
            now = time.time()
            with contextlib.suppress(OSError):
                os.utime(tunnel_file(self._paths))
            if now - before > _SLEPT_S:
                _log.info("asleep for %.0f s", now - before)
                self._woken.set()
            before = now

    async def _open(self, head: SSHHost, client: ClientRecord) -> None:
        """Forward the controller's port, and the ports of Ray that this person may use."""
        self._woken = anyio.Event()
        controller = (await head_ports(head, client))["controller"]
        await head.forward(self._record.ports["controller"], LOOPBACK, controller)
        self._remote = await self._addresses(head, client)
        for key, place in self._remote.items():
            if key != "controller":
                await head.forward(self._record.ports[key], *place)
        address, fingerprint = head.identity
        reached = {"head_address": address, "head_fingerprint": fingerprint}
        ports = {key: port for key, (_, port) in self._remote.items()}
        words = tuple(command(target_of(client.spec.host_specs()[0])) or ())
        self._record = self._record.model_copy(update={**reached, "head_ports": ports, "openssh": words})

    async def _addresses(self, head: SSHHost, client: ClientRecord) -> dict[str, Address]:
        """Return the addresses on the head; a joined cluster reports Ray's only if the role allows it."""
        ports = await head_ports(head, client)
        found = {"controller": (LOOPBACK, ports["controller"])}
        if client.joined:
            ray = await ray_addresses(self._record.ports["controller"], client.token)
            return found | {key: place for key, place in ray.items() if key != "gcs" or client.gcs}
        found["dashboard"] = (LOOPBACK, ports["dashboard"])
        return found | ({"gcs": (client.head_address, ports["gcs"])} if client.gcs else {})

    async def _until_lost(self, head: SSHHost, client: ClientRecord) -> None:
        """Return when the connection is lost, this machine slept, or the head's ports have changed."""
        async with anyio.create_task_group() as group:

            async def first(wait: Callable[[], Awaitable[None]]) -> None:
                await wait()
                group.cancel_scope.cancel()

            for wait in (head.wait_lost, self._woken.wait, lambda: self._until_moved(head, client)):
                group.start_soon(first, wait)

    async def _until_moved(self, head: SSHHost, client: ClientRecord) -> None:
        """Return when the head's ports have changed: its controller, or Ray, may have moved."""
        while True:
            await anyio.sleep(_LOOK_S)
            with contextlib.suppress(RaylaunchError):  # a lost connection is noticed elsewhere
                if (seen := await self._addresses(head, client)) and not seen.items() <= self._remote.items():
                    return

    def _save(self, *, up: bool, why: str = "", hint: str = "", code: str = "cluster_down") -> None:
        self._record = self._record.model_copy(
            update={"up": up, "why": why, "hint": hint, "code": code if why else "", "at": time.time()}
        )
        save_tunnel(self._paths, self._record)


async def ray_addresses(port: int, token: str) -> dict[str, Address]:
    """Query the controller on a local port for Ray's addresses on its host; empty if the token does not allow it."""
    answer = await http_request(port, "/v1/ray", token=token)
    said = answer.json()
    if not answer.ok or not isinstance(said, dict):
        return {}
    dashboard, gcs = urlsplit(str(said.get("dashboard_url"))), urlsplit(f"//{said.get('gcs_address')}")
    found = {"dashboard": (dashboard.hostname, dashboard.port), "gcs": (gcs.hostname, gcs.port)}
    return {key: (host, port) for key, (host, port) in found.items() if host and port}


async def head_ports(head: SSHHost, client: ClientRecord) -> dict[str, int]:
    """Return the head's ports from its record there: they may have changed meanwhile."""
    program = client.programs.get(head.name)
    if program is None:
        return client.head_ports
    path = f"{program.root}/clusters/{client.spec.name}/cluster.json"
    ran = await head.run(["cat", path], limit_s=10)
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        ports = json.loads(ran.out)["ports"]
        if isinstance(ports, dict) and all(isinstance(ports.get(key), int) for key in _PORTS):
            return ports
    return client.head_ports


def main(argv: list[str]) -> int:
    """Run the tunnel of the cluster that `argv` names; return at once if one already runs."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    os.umask(0o077)
    paths = cluster_paths(argv[0])
    with try_lock(paths.root / "tunnel.lock") as acquired:
        if acquired:
            anyio.run(_keep, paths)
    return 0


async def _keep(paths: ClusterPaths) -> None:
    tunnel = Tunnel(paths)
    async with anyio.create_task_group() as group:
        group.start_soon(tunnel.beat)
        await tunnel.run()
        group.cancel_scope.cancel()
