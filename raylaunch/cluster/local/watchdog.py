"""``python -m raylaunch.cluster.keep NAME``: starts a host's part of a cluster again when it is gone.

It checks processes, and whether the controller here responds; nothing beyond this host, so that a cluster whose head
is away is left in peace. It ends by itself when the cluster is taken down here. systemd or cron start it at boot
(`raylaunch.cluster.local.autostart`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator

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
from raylaunch.files import rotate
from raylaunch.paths import ClusterPaths, cluster_paths, storage_errors, write_private
from raylaunch.version import __version__


def revive(argv: list[str]) -> int:
    """Start the Ray of the cluster that is named; return the exit status. The controller runs it in its own process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if len(argv) != 1:
        _log.error("usage: python -m raylaunch.cluster.revive CLUSTER")
        return 2

    async def revived() -> bool:
        return await revive_ray(argv[0], on_step=_notify_controller)

    try:
        started = anyio.run(revived)
    except ConflictError as error:
        _log.info("left to another: %s", error.message)
        return 0
    except RaylaunchError as error:
        _log.error("%s", error)
        return 1
    _log.info("Ray runs again" if started else "nothing to do")
    return 0


def _notify_controller(step: Step) -> None:
    _log.info("%s", step)


_log = logging.getLogger("raylaunch.cluster.keep")

_LOOK_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
_LOCK_S = 1.0
HAND_OVER_S = 3 * _LOOK_S
"""How long a keeper waits for the end of one of another version."""


def missing(record: ClusterRecord) -> str:
    """Return in words what of this host's part of the cluster does not run; empty when all does."""
    if not is_alive(record.ray):
        return "Ray"
    if not record.place.is_worker and not is_alive(record.controller):
        return "the controller"
    return ""


def has_address(address: str) -> bool:
    """Say whether this machine has the address now: at boot, a network may come up late."""
    return not address or any(one.address == address for found in psutil.net_if_addrs().values() for one in found)


async def wake(paths: ClusterPaths) -> str:
    """Start what should run here and does not; return in words what that was.

    Raises:
        ConflictError: another raylaunch is at work on it.
        RaylaunchError: it could not be started.
    """
    async with cluster_lock(paths, limit_s=_LOCK_S):
        record = load_record(paths)
        if record is None or record.wanted != "running" or not (gone := missing(record)):
            return ""
        if not has_address(record.place.address):
            msg = f"this machine does not have its address {record.place.address}"
            raise RaylaunchError(msg, hint="it is tried again: the network may be about to come up")
        if record.place.is_worker:
            await WorkerJoin(paths, record.spec, _tell, place=record.place, cluster_id=record.cluster_id).run()
        else:
            await BringUp(paths, record.spec, _tell).run()
    return gone


async def keep(paths: ClusterPaths) -> None:
    """Wake it whenever something is gone, until the cluster is not wanted here, or another version is its keeper.

    A controller that does not respond is ended first.
    """
    pause, watch = _FIRST_PAUSE_S, HealthWatch()
    while (record := load_record(paths)) is not None and record.wanted == "running":
        rotate(paths.root / "keep.log")
        if keeper(paths) != __version__:
            return
        try:
            if not missing(record) and not await _ended_hung(paths, record, watch):
                pause = _FIRST_PAUSE_S
                await anyio.sleep(_LOOK_S)
                continue
            if gone := await wake(paths):
                _log.info("%s was gone, and runs again", gone)
        except ConflictError as error:
            _log.info("left to another: %s", error.message)
        except RaylaunchError as error:
            _log.warning("%s", error)
        await anyio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


async def _ended_hung(paths: ClusterPaths, record: ClusterRecord, watch: HealthWatch) -> bool:
    """End the controller here if it has not responded for too long; return whether that was so."""
    token = client_token(paths)
    if record.place.is_worker or not await watch.is_hung(record, token):
        return False
    silent_s = watch.silent_s
    if (hung := await end_hung(paths, token, lock_s=_LOCK_S)) is None:
        return False
    watch.note_replaced()
    _log.warning("the controller (pid %d) did not respond for %.0f s and was ended", hung.pid, silent_s)
    return True


def _tell(step: Step) -> None:
    _log.info("%s", step)


@contextlib.contextmanager
def alone(paths: ClusterPaths) -> Iterator[bool]:
    """Yield whether this is the only keeper of the cluster here, for as long as the block lasts."""
    path = paths.root / "keep.lock"
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def keeper(paths: ClusterPaths) -> str:
    """Return the version of raylaunch that is to keep the cluster here; empty when that was never said."""
    try:
        return (paths.root / "keeper").read_text(encoding="utf-8")
    except OSError:
        return ""


def be_keeper(paths: ClusterPaths) -> None:
    """Say that this version keeps the cluster here; a keeper of another one ends when it looks next.

    Raises:
        StorageError: it cannot be written.
    """
    if keeper(paths) != __version__:
        write_private(paths.root / "keeper", __version__)


def is_kept(paths: ClusterPaths) -> bool:
    """Say whether a keeper of the cluster runs here."""
    with alone(paths) as nobody_else:
        return not nobody_else


def main(argv: list[str]) -> int:
    """Keep the cluster that is named; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    os.umask(0o077)
    paths = cluster_paths(argv[0])
    if not paths.root.is_dir():
        _log.error("cluster %s was never started here", argv[0])
        return 2
    deadline = time.monotonic() + HAND_OVER_S
    while time.monotonic() < deadline:  # one of an older version may be about to end
        with alone(paths) as nobody_else:
            if nobody_else:
                be_keeper(paths)
                anyio.run(keep, paths)
                return 0
        time.sleep(_FIRST_PAUSE_S / 4)
    return 0
