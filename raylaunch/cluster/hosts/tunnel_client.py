"""What others ask of a cluster's tunnel: that it is up, or ends. Its process is `raylaunch.cluster.reach.tunnel`.

No verb about jobs may need SSH itself: asyncssh takes longer to load than such a verb.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import anyio

from raylaunch.cluster.client_record import TunnelRecord, load_client, load_tunnel, tunnel_file, tunnel_log
from raylaunch.cluster.processes import end, start_apart
from raylaunch.errors import ClusterDownError, HostTimeoutError, from_wire
from raylaunch.paths import ClusterPaths
from raylaunch.version import is_older

START_S = 30.0
"""For whoever has just brought a cluster up; a verb waits shorter."""
_VERB_S = 8.0
_POLL_S = 0.05
_SILENT_S, _AWAKES_S = 5.0, 2.0
_KNOWN_LATE_S = 2.0


async def ensure_tunnel(paths: ClusterPaths, *, fresh: bool = False, limit_s: float = _VERB_S) -> TunnelRecord:
    """Return a tunnel that is up; start one when none runs, and another one for one that does nothing or is older.

    Args:
        paths: of the cluster on this machine.
        fresh: end one that runs first: its head, or the ports there, have changed.
        limit_s: how long it may take to come up.

    Raises:
        ClusterDownError: nothing is known of the cluster here.
        HostError: the head cannot be reached; the words are the connection's own.
    """
    record = load_tunnel(paths)
    if record is not None and record.alive and (fresh or is_older(record.version) or not await _beats(paths)):
        await _end(record)
        record = None
    if record is not None and record.alive and record.up:
        return record
    if load_client(paths) is None:
        msg = f"cluster {paths.name} is not known on this machine"
        raise ClusterDownError(msg, hint="bring it up: raylaunch up")
    asked_at = time.time()
    if record is None or not record.alive:
        argv = [sys.executable, "-m", "raylaunch.cluster.reach.tunnel", paths.name]
        from raylaunch.cluster.local.ray_head import clean_environment  # noqa: PLC0415 -- one that runs needs none of it

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
    await _end(record)
    return True


async def _end(record: TunnelRecord) -> None:
    """End this tunnel; another one that runs meanwhile stays."""
    await end([record.process], grace_s=0.5)
