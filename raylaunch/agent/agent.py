"""The node agent, a Ray actor on each node; nothing here imports Ray.

It keeps no state beyond the files below its node root, so that it may be killed at any moment and started again. Every
call may be repeated. Blocking work happens in threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from raylaunch.agent import attempt_dir, attempt_files, index_check, job_dir, node_info
from raylaunch.agent.attempt_files import FileStat, disk_use, inventory
from raylaunch.agent.change_feed import ChangeFeed, ChangeReply, Have, HaveFile
from raylaunch.agent.inotify import Watcher
from raylaunch.agent.packages import Packages, Platform, platform_of, storage_error
from raylaunch.agent.processes import end_processes, runner_alive, wait_for_runner
from raylaunch.contract import ATTEMPT, EXIT, VAR_NODE_ROOT, AttemptSpec, Claim, Exit, StopWish
from raylaunch.errors import RaylaunchError

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_WATCH_S = 1.0
_LIVE_POLL_S = 0.02
_QUIET_POLL_S = 0.05
_QUIET_AFTER_S = 2.0
_IDLE_POLL_S = 2.0
_GATHER_S = 0.03
_GATHER_MOST_S = 0.2
_METRICS_S = 0.6
_LARGE_REPLY = 1024 * 1024
_RUNNER_ENDS_S = 3.0
"""How long a runner may still run after it wrote its exit facts: its exit status becomes the Ray job's."""
_THREADS = 16


class FenceResult(NamedTuple):
    """No process of the attempt is running on the node, and none can start any more."""

    killed: int
    """Processes that had to be killed."""
    claim: Claim
    """Who had claimed it; the epoch is `raylaunch.contract.FENCED` if nobody had and the fence claimed it."""
    exit: Exit | None
    """How it ended, if its runner reported that: as the runner wrote it, until the bridge validates it."""
    beat_at: float | None
    """Latest heartbeat of its runner, seconds since the epoch; None if there was none."""


def node_root() -> Path:
    """Return the folder that Ray on this node was given, else ``~/.raylaunch/node``."""
    return Path(os.environ.get(VAR_NODE_ROOT) or "~/.raylaunch/node").expanduser()


def sweep(root: Path, swept: set[str]) -> list[str]:
    """End what is left of attempts whose runner died without an exit file. One round of the watch.

    Args:
        root: The node root.
        swept: Attempts that need no further checks; updated.

    Returns:
        The attempts whose processes were ended now.
    """
    names = attempt_dir.attempts_in(root)
    swept.intersection_update(names)
    ended = []
    for attempt in names:
        if attempt in swept:
            continue
        path = root / "attempts" / attempt
        claim = attempt_dir.read_claim(path)
        if claim is None or runner_alive(claim):
            continue
        spec = attempt_dir.read_json(path / ATTEMPT)
        silent = attempt_dir.read_json(path / EXIT) is None
        if silent and spec is not None and end_processes(str(spec["tag"]), claim, limit_s=5):
            ended.append(attempt)
        swept.add(attempt)
    return ended


def watch(root: Path) -> None:
    """Sweep permanently, in a thread of its own, so that it continues while nobody calls the agent."""
    swept: set[str] = set()
    pause = threading.Event()
    while not pause.wait(_WATCH_S):
        _sweep_and_log(root, swept)


def _sweep_and_log(root: Path, swept: set[str]) -> None:
    try:
        for attempt in sweep(root, swept):
            _log.warning("the runner of %s died; its processes were ended", attempt)
    except (RaylaunchError, OSError) as error:
        _log.warning("cannot check attempts: %s", error)


class NodeAgent:
    """One node's agent. The methods are the actor's calls, see `raylaunch.controller.ray.bridge.RayBridge`."""

    def __init__(self) -> None:
        os.umask(0o077)
        self._root = node_root()
        (self._root / "attempts").mkdir(mode=0o700, parents=True, exist_ok=True)
        self._packages = Packages(self._root)
        self._changes = ChangeFeed(self._root)
        self._checksums: dict[str, dict[str, tuple[FileStat, str]]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="agent")
        self._watcher = Watcher(self._root)
        self._wake: asyncio.Event | None = None
        self._replied_at = float("-inf")
        self._gather_s = _GATHER_S
        self._metrics_at = float("-inf")
        self._last_was_large = False
        threading.Thread(target=watch, args=(self._root,), name="watch", daemon=True).start()

    async def describe(self) -> node_info.NodeFacts:
        """Return what this node is and has."""
        return await self._in_thread(lambda: node_info.describe(self._root))

    async def attempts(self) -> list[str]:
        """Return the attempts that have a folder here."""
        return await self._in_thread(lambda: attempt_dir.attempts_in(self._root))

    async def package_have(self, sha256: str) -> int:
        """Return how many bytes of a package are here; -1 when it is complete."""
        return await self._in_thread(lambda: self._packages.have(sha256))

    async def put_package(self, sha256: str, offset: int, total: int, data: bytes) -> int:
        """Store a piece of a package, and return the same as `package_have`."""
        return await self._in_thread(lambda: self._packages.put(sha256, offset, total, data))

    async def prepare(
        self, spec: AttemptSpec, package: str, secrets: dict[str, str], runner: bytes, have: Mapping[str, HaveFile]
    ) -> job_dir.ReadyAttempt:
        """Create an attempt's folder. `have` lists what the store has of the previous attempt's files."""
        self._changes.expect(spec["attempt"], have)

        def make() -> job_dir.ReadyAttempt:
            unpacked = self._packages.path(package) if package else None
            try:
                return job_dir.prepare(
                    self._root, spec=spec, package=unpacked, secrets=secrets, runner=runner, python=sys.executable
                )
            except OSError as error:
                what = f"the folder of {spec['attempt']} cannot be written"
                raise storage_error(what, error) from error

        ready = await self._in_thread(make)
        if self._wake is not None:
            self._wake.set()
        return ready

    async def job_has(self, attempt: str) -> int:
        """Return the number of the attempt whose checkpoints and outputs an attempt's job has here; 0 for none."""
        return await self._in_thread(lambda: job_dir.last_writer(self._root, attempt))

    async def begin_bringing(self, attempt: str, tag: str, files: Mapping[str, job_dir.StoredFile]) -> list[str]:
        """Prepare the folder of an attempt's job, and return which of its files have to be sent."""

        def start() -> list[str]:
            return job_dir.begin_bringing(self._root, attempt, tag, files)

        return await self._in_thread(start)

    async def bring(self, attempt: str, path: str, offset: int, data: bytes, wanted: job_dir.StoredFile | None) -> None:
        """Store a piece of such a file; `wanted` describes the complete file and comes with the last piece."""

        def take() -> None:
            try:
                job_dir.bring(self._root, attempt, path, offset, data, wanted)
            except OSError as error:
                what = f"{path} of the previous attempt cannot be written"
                raise storage_error(what, error) from error

        await self._in_thread(take)

    async def end_bringing(self, attempt: str, before: int, collected: list[str]) -> None:
        """Record that the files of attempt number `before` are here, and which of them it had collected."""
        await self._in_thread(lambda: job_dir.end_bringing(self._root, attempt, before, collected))

    async def read_left(self, attempt: str, path: str, offset: int, limit: int) -> job_dir.LeftPiece:
        """Return a piece of an output that was not kept."""
        return await self._in_thread(lambda: job_dir.read_left(self._root, attempt, path, offset, limit))

    async def disk_use(self) -> dict[str, int]:
        """Return the bytes of raylaunch's folders on this node, by what they hold."""
        return await self._in_thread(lambda: disk_use(self._root))

    async def platform(self, environment: dict[str, str], env: dict[str, str]) -> Platform:
        """Return which wheels fit an environment here."""
        return await self._in_thread(lambda: platform_of(environment, {**os.environ, **env}))

    async def index_look(self, env: dict[str, str], kind: str, environment: dict[str, str]) -> dict[str, object]:
        """Return the same, and under ``index`` whether a build with these variables reaches a package index."""
        reaches_index = await self._in_thread(lambda: index_check.reaches_index({**os.environ, **env}, kind=kind))
        return {**await self.platform(environment, env), "index": reaches_index}

    async def stop(self, attempt: str, wish: StopWish) -> None:
        """Write a stop request for an attempt."""
        await self._in_thread(lambda: attempt_dir.request_stop(self._root, attempt, wish))

    async def fence(self, attempt: str, tag: str) -> FenceResult:
        """End all processes of an attempt, and prevent that any starts again."""

        def end() -> FenceResult:
            claim = attempt_dir.close(self._root, attempt)
            path = attempt_dir.attempt_folder(self._root, attempt)
            if attempt_dir.read_json(path / EXIT) is not None:
                wait_for_runner(claim, limit_s=_RUNNER_ENDS_S)
            beat_at = attempt_dir.beat_at(path)
            killed = end_processes(tag, claim)
            return FenceResult(killed, claim, cast("Exit | None", attempt_dir.read_json(path / EXIT)), beat_at)

        return await self._in_thread(end)

    async def changes(self, session: str, have: Have | None, wait_s: float) -> ChangeReply:
        """Return what changed in the attempts' files; wait up to `wait_s` for something. See `ChangeFeed.take`."""
        wake = self._wake = self._wake or asyncio.Event()
        deadline = time.monotonic() + wait_s
        if not self._last_was_large:
            await _sleep_until(self._replied_at + self._gather_s)
        rounds = 0
        while True:
            wake.clear()
            rounds += 1
            reply = await self._poll(session, have)
            have = None
            left_s = deadline - time.monotonic()
            if reply["resync"] or reply["chunks"] or reply["attempts"] or left_s <= 0:
                self._adapt_gathering(reply, at_once=rounds == 1, in_time=left_s > 0)
                return reply
            await self._watcher.wait_for_events(wake, min(self._poll_s(live=reply["live"]), left_s))

    async def _poll(self, session: str, have: Have | None) -> ChangeReply:
        """Check the files once; those that grow with each training step only as often as somebody reads them."""
        now = time.monotonic()
        metrics = now - self._metrics_at >= _METRICS_S
        if metrics:
            self._metrics_at = now

        def take() -> ChangeReply:
            self._watcher.follow(attempt_dir.attempts_in(self._root))
            self._watcher.drain()
            return self._changes.take(session, have, metrics=metrics)

        return await self._in_thread(take)

    def _adapt_gathering(self, reply: ChangeReply, *, at_once: bool, in_time: bool) -> None:
        """Wait longer while changes keep coming, so that a verbose log costs no more than a quiet one."""
        self._last_was_large = sum(len(chunk.data) for chunk in reply["chunks"]) > _LARGE_REPLY
        self._gather_s = min(self._gather_s * 2, _GATHER_MOST_S) if at_once else _GATHER_S
        if in_time:
            self._replied_at = time.monotonic()

    def _poll_s(self, *, live: bool) -> float:
        """Return how long to wait between two checks of the files when nothing changed."""
        if not live:
            return _IDLE_POLL_S
        if self._watcher.works:
            return _METRICS_S
        quiet_s = time.monotonic() - self._replied_at
        return _LIVE_POLL_S if quiet_s < _QUIET_AFTER_S else _QUIET_POLL_S

    async def inventory(self, attempt: str, *, checksums: bool) -> dict[str, tuple[int, str]]:
        """Return size and checksum of all files of an ended attempt that belong in the store."""
        path = attempt_dir.attempt_folder(self._root, attempt)
        known = self._checksums.setdefault(attempt, {})
        found = await self._in_thread(lambda: inventory(path, checksums=checksums, known=known))
        self._changes.check_again(attempt)
        if self._wake is not None:
            self._wake.set()
        return found

    async def ray_log(
        self, logs: str, submission: str, *, offset: int, tail: int | None, limit: int
    ) -> attempt_files.Slice:
        """Return bytes of an external job's log; `logs` is the folder of Ray's logs on this node."""
        return await self._in_thread(
            lambda: attempt_files.read_ray_log(Path(logs), submission, offset=offset, tail=tail, limit=limit)
        )

    async def ray_log_grown(self, logs: str, submission: str, size: int, wait_s: float) -> int:
        """Return the size of such a log as soon as it exceeds `size`, or after `wait_s`."""
        started = time.monotonic()
        while True:
            now = await self._in_thread(lambda: attempt_files.ray_log_size(Path(logs), submission))
            waited_s = time.monotonic() - started
            if now > size or waited_s >= wait_s:
                return now
            await asyncio.sleep(_LIVE_POLL_S if waited_s < _QUIET_AFTER_S else _QUIET_POLL_S)

    async def forget(self, attempt: str, *, again: bool = False) -> None:
        """Delete an attempt's folder. With `again`, the job's checkpoints and outputs stay for the next attempt."""
        self._checksums.pop(attempt, None)
        await self._in_thread(lambda: job_dir.forget(self._root, attempt, again=again))

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


async def _sleep_until(when: float) -> None:
    left_s = when - time.monotonic()
    if left_s > 0:
        await asyncio.sleep(left_s)
