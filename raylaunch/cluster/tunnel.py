"""The tunnel: a background process that keeps a cluster's controller and Ray reachable on loopback here.

``python -m raylaunch.cluster.tunnel NAME``. Whoever needs it starts it; there is one a cluster, by a lock that it holds
while it lives. A lost connection is made again, with the same local ports, for as long as the cluster is wanted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import anyio

from raylaunch.cluster.answer import ask
from raylaunch.cluster.client_record import (
    ClientRecord,
    TunnelRecord,
    load_client,
    load_tunnel,
    save_tunnel,
    tunnel_file,
    tunnel_log,
)
from raylaunch.cluster.home import ClusterPaths, cluster_paths
from raylaunch.cluster.ports import LOOPBACK, free_ports, is_free
from raylaunch.cluster.process import end, identify, start_apart
from raylaunch.cluster.ray_head import clean_environment
from raylaunch.cluster.ssh import Machine, machine
from raylaunch.cluster.targets import target_of
from raylaunch.errors import ClusterDownError, HostLostError, HostTimeoutError, RaylaunchError, from_wire

_log = logging.getLogger("raylaunch.cluster.tunnel")

START_S = 30.0
"""For whoever has just brought a cluster up; a verb waits shorter."""
_VERB_S = 8.0
_POLL_S = 0.05
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0
_KEEPALIVE_S, _KEEPALIVES_MISSED = 2, 3
_BEAT_S, _SILENT_S, _AWAKES_S = 1.0, 5.0, 2.0
_SLEPT_S = 8.0
"""Between two beats: this machine slept, or the process was stopped. The connection is not waited for then."""
_PORTS = ("controller", "dashboard", "gcs")
_KNOWN_LATE_S = 2.0
_LOOK_S = 20.0
_LOST = "are you on its network or VPN? Run the same again in some seconds"

Address = tuple[str, int]


async def ensure_tunnel(paths: ClusterPaths, *, fresh: bool = False, limit_s: float = _VERB_S) -> TunnelRecord:
    """Return a tunnel that is up; start one when none runs, and another one for one that runs and does nothing.

    Args:
        paths: of the cluster on this machine.
        fresh: end one that runs first: its head, or the ports there, have changed.
        limit_s: how long it may take to come up.

    Raises:
        ClusterDownError: nothing is known of the cluster here.
        HostError: the head cannot be reached; the words are the connection's own.
    """
    record = load_tunnel(paths)
    if fresh or (record is not None and record.alive and not await _beats(paths)):
        await end_tunnel(paths)
        record = None
    if record is not None and record.alive and record.up:
        return record
    if load_client(paths) is None:
        msg = f"cluster {paths.name} is not known on this machine"
        raise ClusterDownError(msg, hint="bring it up: raylaunch up")
    asked_at = time.time()
    if record is None or not record.alive:
        argv = [sys.executable, "-m", "raylaunch.cluster.tunnel", paths.name]
        env = {**clean_environment(os.environ, paths), **_agent(os.environ)}
        await start_apart(argv, env=env, cwd=Path("/"), log=tunnel_log(paths))
    return await _wait_up(paths, asked_at, limit_s)


async def _beats(paths: ClusterPaths) -> bool:
    """Whether the tunnel's process does something. One that has just been woken is given some time."""
    with anyio.move_on_after(_AWAKES_S):
        while (silent := silent_s(paths)) is not None and silent > _SILENT_S:  # noqa: ASYNC110 -- another process
            await anyio.sleep(_POLL_S)
        return True
    return False


def silent_s(paths: ClusterPaths) -> float | None:
    """Return how long ago the tunnel's process said that it does something; None when it never did."""
    try:
        return time.time() - tunnel_file(paths).stat().st_mtime
    except OSError:
        return None


def _agent(environ: os._Environ[str]) -> dict[str, str]:
    """The key agent may hold the only key; clean environments leave all of SSH's variables out."""
    return {key: environ[key] for key in ("SSH_AUTH_SOCK",) if key in environ}


async def _wait_up(paths: ClusterPaths, asked_at: float, limit_s: float) -> TunnelRecord:
    """Wait until it is up; a failure that it tells after it was asked is raised."""
    with anyio.move_on_after(limit_s):
        while True:
            record = load_tunnel(paths)
            if record is not None and record.up and record.alive:
                return record
            if record is not None and record.why and (record.at >= asked_at or time.time() - asked_at > _KNOWN_LATE_S):
                raise from_wire(record.code, record.why, record.hint)
            await anyio.sleep(_POLL_S)
    msg = f"the head of cluster {paths.name} has not been reached within {limit_s:.0f} s"
    hint = f"it is tried again in the background; are you on its network or VPN? See {tunnel_log(paths)}"
    raise HostTimeoutError(msg, hint=hint, step="tunnel")


async def end_tunnel(paths: ClusterPaths) -> bool:
    """End the cluster's tunnel; return whether there was one."""
    record = load_tunnel(paths)
    if record is None or not record.alive:
        return False
    await end([record.process], grace_s=0.5)
    return True


class Tunnel:
    """The process itself: one head, three ports, for as long as it is wanted."""

    def __init__(self, paths: ClusterPaths) -> None:
        self._paths = paths
        had = load_tunnel(paths)
        own = identify(os.getpid(), sys.argv)
        if own is None:  # a process always finds itself
            raise AssertionError
        ports = {key: had.ports[key] for key in _PORTS if had and key in had.ports and is_free(had.ports[key])}
        missing = [key for key in _PORTS if key not in ports]
        ports |= zip(missing, free_ports(len(missing), avoid=tuple(ports.values())), strict=True)
        self._remote: dict[str, Address] = {}
        self._woken = anyio.Event()
        self._record = TunnelRecord(process=own, ports=ports, at=time.time())

    async def run(self) -> None:
        """Keep the way open until the cluster is not wanted any more."""
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
                    await self._until_over(head, client)
                    why = f"the connection to {head.name} was lost; it is being made again"
                    self._save(up=False, why=why, hint=_LOST, code=HostLostError.code)  # before it is closed in order
            except RaylaunchError as error:
                self._save(up=False, why=error.message, hint=error.hint, code=error.code)
            _log.info("down: %s", self._record.why)
            await self._rest(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def beat(self) -> None:
        """Say every second that this process does something; when it could not, the connection is made anew."""
        before = time.time()
        while True:
            await anyio.sleep(_BEAT_S)
            now = time.time()
            with contextlib.suppress(OSError):
                os.utime(tunnel_file(self._paths))
            if now - before > _SLEPT_S:
                _log.info("was asleep for %.0f s", now - before)
                self._woken.set()
            before = now

    async def _rest(self, pause: float) -> None:
        with anyio.move_on_after(pause):
            await self._woken.wait()

    async def _open(self, head: Machine, client: ClientRecord) -> None:
        """Open the way to the controller, and to what of Ray this person may use."""
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
        self._record = self._record.model_copy(update={**reached, "head_ports": ports})

    async def _addresses(self, head: Machine, client: ClientRecord) -> dict[str, Address]:
        """Return where on the head is what; a cluster that was joined says itself where Ray is, to whom may know."""
        ports = await head_ports(head, client)
        found = {"controller": (LOOPBACK, ports["controller"])}
        if client.joined:
            return found | await ray_addresses(self._record.ports["controller"], client.token)
        return found | {"dashboard": (LOOPBACK, ports["dashboard"]), "gcs": (client.head_address, ports["gcs"])}

    async def _until_over(self, head: Machine, client: ClientRecord) -> None:
        """Return when the connection is lost, this machine slept, or the head's ports are other ones."""
        async with anyio.create_task_group() as group:

            async def first(wait: Callable[[], Awaitable[None]]) -> None:
                await wait()
                group.cancel_scope.cancel()

            for wait in (head.wait_lost, self._woken.wait, lambda: self._until_moved(head, client)):
                group.start_soon(first, wait)

    async def _until_moved(self, head: Machine, client: ClientRecord) -> None:
        """Return when the head's ports are other ones: its controller, or Ray, may have moved."""
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
    """Ask the controller behind a port here where Ray is on its host; nothing where the token may not know."""
    answer = await ask(port, "/v1/ray", token=token)
    said = answer.json()
    if not answer.ok or not isinstance(said, dict):
        return {}
    dashboard, gcs = urlsplit(str(said.get("dashboard_url"))), urlsplit(f"//{said.get('gcs_address')}")
    found = {"dashboard": (dashboard.hostname, dashboard.port), "gcs": (gcs.hostname, gcs.port)}
    return {key: (host, port) for key, (host, port) in found.items() if host and port}


async def head_ports(head: Machine, client: ClientRecord) -> dict[str, int]:
    """Return the head's ports, from its record there: they may have changed while nobody looked from here."""
    program = client.programs.get(head.name)
    if program is None:
        return client.head_ports
    path = f"{program.root}/clusters/{client.spec.name}/cluster.json"
    ran = await head.run(["cat", path], limit_s=10)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        ports = json.loads(ran.out)["ports"]
        if isinstance(ports, dict) and all(isinstance(ports.get(key), int) for key in _PORTS):
            return ports
    return client.head_ports


def main(argv: list[str]) -> int:
    """Keep the tunnel of the cluster that is named; return at once when it has one already."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    os.umask(0o077)
    paths = cluster_paths(argv[0])
    with (paths.root / "tunnel.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        anyio.run(_keep, paths)
    return 0


async def _keep(paths: ClusterPaths) -> None:
    tunnel = Tunnel(paths)
    async with anyio.create_task_group() as group:
        group.start_soon(tunnel.beat)
        await tunnel.run()
        group.cancel_scope.cancel()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
