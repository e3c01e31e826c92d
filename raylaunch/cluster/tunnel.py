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
from pathlib import Path

import anyio

from raylaunch.cluster.client_record import (
    ClientRecord,
    TunnelRecord,
    load_client,
    load_tunnel,
    save_tunnel,
    tunnel_log,
)
from raylaunch.cluster.home import ClusterPaths, cluster_paths
from raylaunch.cluster.ports import LOOPBACK, free_ports, is_free
from raylaunch.cluster.process import end, identify, start_apart
from raylaunch.cluster.ray_head import clean_environment
from raylaunch.cluster.ssh import Machine, machine
from raylaunch.cluster.targets import target_of
from raylaunch.errors import ClusterDownError, RaylaunchError, from_wire

_log = logging.getLogger("raylaunch.cluster.tunnel")

START_S = 30.0
_POLL_S = 0.05
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_PORTS = ("controller", "dashboard", "gcs")
_KNOWN_LATE_S = 2.0
_LOOK_S = 20.0


async def ensure_tunnel(paths: ClusterPaths, *, fresh: bool = False) -> TunnelRecord:
    """Return a tunnel that is up; start one when none runs.

    Args:
        paths: of the cluster on this machine.
        fresh: end one that runs first: its head, or the ports there, have changed.

    Raises:
        ClusterDownError: nothing is known of the cluster here.
        RaylaunchError: the head cannot be reached; the words are the connection's own.
    """
    record = load_tunnel(paths)
    if fresh:
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
    return await _wait_up(paths, asked_at)


def _agent(environ: os._Environ[str]) -> dict[str, str]:
    """The key agent may hold the only key; clean environments leave all of SSH's variables out."""
    return {key: environ[key] for key in ("SSH_AUTH_SOCK",) if key in environ}


async def _wait_up(paths: ClusterPaths, asked_at: float) -> TunnelRecord:
    """Wait until it is up; a failure that it tells after it was asked is raised."""
    with anyio.move_on_after(START_S):
        while True:
            record = load_tunnel(paths)
            if record is not None and record.up and record.alive:
                return record
            if record is not None and record.why and (record.at >= asked_at or time.time() - asked_at > _KNOWN_LATE_S):
                raise from_wire(record.code, record.why, record.hint)
            await anyio.sleep(_POLL_S)
    msg = f"the tunnel to cluster {paths.name} did not come up within {START_S:.0f} s"
    raise ClusterDownError(msg, hint=f"see {tunnel_log(paths)}")


async def end_tunnel(paths: ClusterPaths) -> bool:
    """End the cluster's tunnel; return whether there was one."""
    record = load_tunnel(paths)
    if record is None or not record.alive:
        return False
    await end([record.process], grace_s=3)
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
        self._remote: dict[str, int] = {}
        self._record = TunnelRecord(process=own, ports=ports, at=time.time())

    async def run(self) -> None:
        """Keep the way open until the cluster is not wanted any more."""
        self._save(up=False)
        pause = _FIRST_PAUSE_S
        while (client := load_client(self._paths)) is not None and client.wanted == "running":
            try:
                async with machine(target_of(client.spec.host_specs()[0])) as head:
                    await self._open(head, client)
                    self._save(up=True)
                    _log.info("up: %s", self._record.ports)
                    pause = _FIRST_PAUSE_S
                    await self._until_over(head, client)
                self._save(up=False, why=f"the connection to {head.name} was lost; it is being made again")
            except RaylaunchError as error:
                self._save(up=False, why=error.message, hint=error.hint, code=error.code)
            _log.info("down: %s", self._record.why)
            await anyio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _open(self, head: Machine, client: ClientRecord) -> None:
        self._remote = await head_ports(head, client)
        for key in _PORTS:
            if key not in self._remote:  # who joined as no operator has no use for Ray's
                continue
            host = client.head_address if key == "gcs" else LOOPBACK
            await head.forward(self._record.ports[key], host, self._remote[key])
        address, fingerprint = head.identity
        self._record = self._record.model_copy(
            update={"head_address": address, "head_fingerprint": fingerprint, "head_ports": self._remote}
        )

    async def _until_over(self, head: Machine, client: ClientRecord) -> None:
        """Return when the connection is lost, or the head's ports are other ones: its controller may have moved."""
        while True:
            with anyio.move_on_after(_LOOK_S):
                await head.wait_lost()
                return
            if await head_ports(head, client) != self._remote:
                return

    def _save(self, *, up: bool, why: str = "", hint: str = "", code: str = "cluster_down") -> None:
        self._record = self._record.model_copy(
            update={"up": up, "why": why, "hint": hint, "code": code if why else "", "at": time.time()}
        )
        save_tunnel(self._paths, self._record)


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
        anyio.run(Tunnel(paths).run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
