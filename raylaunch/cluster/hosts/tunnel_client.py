"""Starting and ending a cluster's tunnel, whose process is `raylaunch.cluster.reach.tunnel`.

This module does not import SSH: asyncssh takes longer to load than a command about jobs.
"""

from __future__ import annotations

import contextlib
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
"""The limit of `up`; other commands wait less."""
_VERB_S = 8.0
_POLL_S = 0.05
_SILENT_S, _AWAKES_S = 5.0, 2.0
_KNOWN_LATE_S = 2.0
_GRACE_S = 0.5


async def ensure_tunnel(paths: ClusterPaths, *, fresh: bool = False, limit_s: float = _VERB_S) -> TunnelRecord:
    """Return a tunnel that is up; start one if none runs, and replace one that hangs or has an older version.

    Args:
        paths: of the cluster on this machine.
        fresh: replace a running one, because its head or the ports there have changed.
        limit_s: how long it may take to come up.

    Raises:
        ClusterDownError: the cluster is not known here.
        HostError: the head cannot be reached; the error is the connection's own.
    """
    record = load_tunnel(paths)
    if record is not None and record.alive and (fresh or is_older(record.version) or not await _beats(paths)):
        await end([record.process], grace_s=_GRACE_S)
        record = None
    if record is not None and record.alive and record.up:
        return record
    if load_client(paths) is None:
        msg = f"cluster {paths.name} is not known on this machine"
        raise ClusterDownError(msg, hint="bring it up: raylaunch up")
    asked_at = time.time()
    if record is None or not record.alive:
        argv = [sys.executable, "-m", "raylaunch.cluster.reach.tunnel", paths.name]
        from raylaunch.cluster.local.ray_head import clean_environment  # noqa: PLC0415 -- not needed for a running tunnel

        ssh_agent = {key: os.environ[key] for key in ("SSH_AUTH_SOCK",) if key in os.environ}
        env = clean_environment(os.environ, paths) | ssh_agent
        await start_apart(argv, env=env, cwd=Path("/"), log=tunnel_log(paths))
    return await _wait_up(paths, asked_at, limit_s)


async def _beats(paths: ClusterPaths) -> bool:
    """Return whether the tunnel's process is alive. One that has just been woken gets some time."""
    with anyio.move_on_after(_AWAKES_S):
        with contextlib.suppress(OSError):  # there was no heartbeat yet
            while time.time() - tunnel_file(paths).stat().st_mtime > _SILENT_S:  # noqa: ASYNC110 -- another process
                await anyio.sleep(_POLL_S)
        return True
    return False


async def _wait_up(paths: ClusterPaths, asked_at: float, limit_s: float) -> TunnelRecord:
    """Wait until it is up; raise a failure that it reports after `asked_at`."""
    with anyio.move_on_after(limit_s):
        while True:
            record = load_tunnel(paths)
            if record is not None and record.up and record.alive:
                return record
            if record is not None and record.why and (record.at >= asked_at or time.time() - asked_at > _KNOWN_LATE_S):
                raise from_wire(record.code, record.why, record.hint)
            await anyio.sleep(_POLL_S)
    msg = f"the head of cluster {paths.name} has not been reached within {limit_s:.0f} s"
    hint = f"retrying in the background; are you on its network or VPN? See {tunnel_log(paths)}"
    raise HostTimeoutError(msg, hint=hint, step="tunnel")


async def end_tunnel(paths: ClusterPaths) -> bool:
    """End the cluster's tunnel; return whether there was one."""
    record = load_tunnel(paths)
    if record is None or not record.alive:
        return False
    await end([record.process], grace_s=_GRACE_S)
    return True
