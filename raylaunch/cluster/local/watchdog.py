"""The watchdog of a host's part of a cluster (``python -m raylaunch.cluster.keep NAME``), and Ray's restart.

It checks processes, and whether the controller here responds; nothing beyond this host, so it does nothing while only
the head is away. It exits when the cluster is taken down here. systemd or cron start it at boot
(`raylaunch.cluster.local.autostart`). The controller restarts Ray by ``python -m raylaunch.cluster.revive NAME``.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import AbstractContextManager

import anyio
import psutil

from raylaunch.cluster.local.backend import revive_ray
from raylaunch.cluster.local.health import HealthWatch, end_hung
from raylaunch.cluster.local.inspect import client_token
from raylaunch.cluster.local.node_up import BringUp, WorkerJoin
from raylaunch.cluster.processes import is_alive
from raylaunch.cluster.record import ClusterRecord, cluster_lock, load_record
from raylaunch.cluster.types import Step
from raylaunch.errors import ConflictError, RaylaunchError
from raylaunch.files import rotate, try_lock
from raylaunch.paths import ClusterPaths, cluster_paths, storage_errors, write_private
from raylaunch.version import __version__

_POLL_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
_LOCK_S = 1.0
HAND_OVER_S = 3 * _POLL_S
"""How long a watchdog waits for one of another version to exit."""

_log = logging.getLogger("raylaunch.cluster.keep")


def main(argv: list[str]) -> int:
    """Watch the cluster that `argv` names; return the exit status."""
    _start_logging()
    os.umask(0o077)
    paths = cluster_paths(argv[0])
    if not paths.root.is_dir():
        _log.error("cluster %s was never started here", argv[0])
        return 2
    deadline = time.monotonic() + HAND_OVER_S
    while time.monotonic() < deadline:  # one of an older version may be about to exit
        with _only_watchdog(paths) as acquired:
            if acquired:
                set_watchdog_version(paths)
                anyio.run(_watch, paths)
                return 0
        time.sleep(_FIRST_PAUSE_S / 4)
    return 0


def revive(argv: list[str]) -> int:
    """Restart the Ray of the cluster that `argv` names; return the exit status."""
    _start_logging()
    if len(argv) != 1:
        _log.error("usage: python -m raylaunch.cluster.revive CLUSTER")
        return 2

    async def restart() -> bool:
        return await revive_ray(argv[0], on_step=_log_step)

    try:
        started = anyio.run(restart)
    except ConflictError as error:
        _log.info("another process is changing the cluster: %s", error.message)
        return 0
    except RaylaunchError as error:
        _log.error("%s", error)
        return 1
    _log.info("Ray is running again" if started else "nothing to do")
    return 0


def watchdog_version(paths: ClusterPaths) -> str:
    """Return the version of raylaunch whose watchdog should run here; empty if none was ever set."""
    try:
        return (paths.root / "keeper").read_text(encoding="utf-8")
    except OSError:
        return ""


def set_watchdog_version(paths: ClusterPaths) -> None:
    """Make this version the one whose watchdog runs here; a watchdog of another version exits at its next check.

    Raises:
        StorageError: it cannot be written.
    """
    if watchdog_version(paths) != __version__:
        write_private(paths.root / "keeper", __version__)


def is_watched(paths: ClusterPaths) -> bool:
    """Return whether a watchdog of the cluster runs here."""
    with _only_watchdog(paths) as acquired:
        return not acquired


async def _watch(paths: ClusterPaths) -> None:
    """Restart what has exited until the cluster should not run here, or another version is its watchdog.

    A controller that does not respond is ended first.
    """
    pause, health = _FIRST_PAUSE_S, HealthWatch()
    while (record := load_record(paths)) is not None and record.wanted == "running":
        rotate(paths.root / "keep.log")
        if watchdog_version(paths) != __version__:
            return
        try:
            if not _exited(record) and not await _ended_hung(paths, record, health):
                pause = _FIRST_PAUSE_S
                await anyio.sleep(_POLL_S)
                continue
            if restarted := await _restart(paths):
                _log.info("%s had exited and was restarted", restarted)
        except ConflictError as error:
            _log.info("another process is changing the cluster: %s", error.message)
        except RaylaunchError as error:
            _log.warning("%s", error)
        await anyio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _exited(record: ClusterRecord) -> str:
    """Return which of this host's processes is not running; empty if all are."""
    if not is_alive(record.ray):
        return "Ray"
    if not record.place.is_worker and not is_alive(record.controller):
        return "the controller"
    return ""


async def _ended_hung(paths: ClusterPaths, record: ClusterRecord, health: HealthWatch) -> bool:
    """End the controller here if it has not responded for too long; return whether that was so."""
    token = client_token(paths)
    if record.place.is_worker or not await health.is_hung(record, token):
        return False
    silent_s = health.silent_s
    if (hung := await end_hung(paths, token, lock_s=_LOCK_S)) is None:
        return False
    health.note_replaced()
    _log.warning("the controller (pid %d) did not respond for %.0f s and was ended", hung.pid, silent_s)
    return True


async def _restart(paths: ClusterPaths) -> str:
    """Start what should run here and does not; return what that was.

    Raises:
        ConflictError: another raylaunch command is changing the cluster.
        RaylaunchError: it could not be started.
    """
    async with cluster_lock(paths, limit_s=_LOCK_S):
        record = load_record(paths)
        if record is None or record.wanted != "running" or not (exited := _exited(record)):
            return ""
        if not _has_address(record.place.address):
            msg = f"this machine does not have its address {record.place.address}"
            raise RaylaunchError(msg, hint="retrying: the network may still be starting")
        if record.place.is_worker:
            await WorkerJoin(paths, record.spec, _log_step, place=record.place, cluster_id=record.cluster_id).run()
        else:
            await BringUp(paths, record.spec, _log_step).run()
    return exited


def _has_address(address: str) -> bool:
    """Return whether this machine has the address now: at boot, a network may come up late."""
    return not address or any(one.address == address for found in psutil.net_if_addrs().values() for one in found)


def _only_watchdog(paths: ClusterPaths) -> AbstractContextManager[bool]:
    """Try to become the only watchdog of the cluster here; yield whether that succeeded."""
    lock = paths.root / "keep.lock"
    with storage_errors(lock):
        lock.touch(mode=0o600)
    return try_lock(lock)


def _start_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")


def _log_step(step: Step) -> None:
    _log.info("%s", step)
