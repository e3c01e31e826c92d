"""Attempts on a Ray of which only the dashboard's address is reached: Ray's log of each, followed into the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from raylaunch.controller.link_events import AttemptSeen, LinkEvent, StoreProblem
from raylaunch.controller.mirror import GapError, Mirror
from raylaunch.controller.ray_dashboard import RayDashboard
from raylaunch.controller.ray_jobs import RayJob
from raylaunch.controller.told_log import ToldLog
from raylaunch.errors import ClusterDownError, ClusterError
from raylaunch.node.changes import Chunk
from raylaunch.node.packages import file_sha256, storage_error
from raylaunch.runner.contract import RANK_LOG, Claim, Exit, Facts

_log = logging.getLogger(__name__)

_PIECE = 8 * 1024 * 1024
_REST = 5
"""Ray sends a whole log each time: between two looks at it is so many times as long as one took."""
_ENDS_S = 20.0
_ENDS_LOOK_S = 0.3
_LOG = RANK_LOG.format(rank=0)
_NO_FILES = "only the dashboard's address of this Ray is reached: only the log comes back"


class _Followed:
    """One attempt: how far its log is taken in."""

    def __init__(self, attempt: str) -> None:
        self.attempt = attempt
        self.log = ToldLog()
        self.taken = 0
        """Bytes of the training's own in what was read of the log."""
        self.whole = False
        self.look_at = 0.0
        self.seen: AttemptSeen | None = None
        self.lock = asyncio.Lock()


class FollowedAttempts:
    """Follows them. Use it from one event loop.

    Args:
        ray: where Ray answers.
        store: the folder to write into.
        emit: told what is seen.
        alive: whether Ray lists a node as alive.
    """

    def __init__(
        self, ray: RayDashboard, *, store: Path, emit: Callable[[LinkEvent], None], alive: Callable[[str], bool]
    ) -> None:
        self._ray = ray
        self._mirror = Mirror(store)
        self._emit = emit
        self._alive = alive
        self._followed: dict[str, _Followed] = {}
        self._stopped: set[str] = set()

    def asked_to_stop(self, attempt: str) -> None:
        """Remember that the end which follows was wanted here."""
        self._stopped.add(attempt)

    def forget(self, attempt: str) -> None:
        """Drop what is remembered of an attempt; its files stay."""
        self._followed.pop(attempt, None)
        self._stopped.discard(attempt)
        self._mirror.forget(attempt)

    async def look(self) -> None:
        """Take in what is new of all attempts that go on. Raises `ClusterDownError` where Ray does not answer."""
        for job in await self._ray.all():
            name = job.submission_id or ""
            ours = (job.metadata or {}).get("raylaunch_job") and self._mirror.wanted(name)
            if ours and not job.ended and job.driver_node_id:
                await self._take(self._of(name), job)

    async def over(self, attempt: str) -> dict[str, object]:
        """Return how an attempt ended, as `raylaunch.node.steward.FenceResult`; Ray is made to end what still runs.

        Raises:
            ClusterError: Ray has not ended it yet.
            ClusterDownError: Ray does not answer.
        """
        job = await self._ended(attempt)
        followed = self._of(attempt)
        if job is None:
            return {"killed": 0, "claim": None, "exit": None}
        if job.driver_node_id and not followed.whole:
            try:
                await self._take(followed, job)
            except ClusterDownError:
                if self._alive(job.driver_node_id):
                    raise
        return {"killed": 0, "claim": _claim(followed), "exit": self._exit(followed, job)}

    async def settle(self, attempt: str) -> bool:
        """Bring the log in the store onto its disk; whether all of it is there."""
        if not self._mirror.wanted(attempt):
            return True
        path = self._mirror.folder(attempt) / _LOG
        if path.is_file():
            checksums = {_LOG: await asyncio.to_thread(file_sha256, path)}
            await asyncio.to_thread(self._mirror.sync, attempt, [_LOG])
            for event in self._mirror.seal(attempt, checksums):
                self._emit(event)
        job = await self._ray.get(attempt)
        return self._of(attempt).whole or job is None or not job.driver_node_id or not self._alive(job.driver_node_id)

    async def _ended(self, attempt: str) -> RayJob | None:
        """Wait a little for Ray to say that it is over; else have it ended, and wait again."""
        for stop in (self._of(attempt).log.exit is None, True):
            job = await self._ray.get(attempt)
            if job is not None and not job.ended and stop:
                await self._ray.stop(attempt)
            until = time.monotonic() + _ENDS_S
            while job is not None and not job.ended and time.monotonic() < until:
                await asyncio.sleep(_ENDS_LOOK_S)
                job = await self._ray.get(attempt)
            if job is None or job.ended:
                return job
        msg = f"Ray has not ended {attempt} yet; what waits for its start there, it ends when that comes"
        raise ClusterError(msg)

    def _of(self, attempt: str) -> _Followed:
        return self._followed.setdefault(attempt, _Followed(attempt))

    async def _take(self, followed: _Followed, job: RayJob) -> None:
        async with followed.lock:
            began = time.monotonic()
            if followed.whole or (not job.ended and began < followed.look_at):
                return
            try:
                await self._take_all(followed, job)
            except (OSError, GapError) as error:
                self._followed.pop(followed.attempt, None)  # it is read anew, and goes on from the disk
                if isinstance(error, GapError):
                    return
                problem = storage_error(f"the log of {followed.attempt} cannot be written", error)
                self._emit(StoreProblem(attempt=followed.attempt, message=problem.message))
                raise problem from error
            followed.look_at = time.monotonic() + _REST * (time.monotonic() - began)
            self._say(followed, job)

    async def _take_all(self, followed: _Followed, job: RayJob) -> None:
        while True:
            data, size = await self._ray.driver_log(
                followed.attempt, job.driver_node_id or "", offset=followed.log.read, limit=_PIECE
            )
            at_end = followed.log.read + len(data) >= size
            kept = followed.log.feed(data, last=job.ended and at_end)
            if kept:
                await asyncio.to_thread(self._write, followed, kept)
            if at_end:
                followed.whole = job.ended
                return

    def _write(self, followed: _Followed, kept: bytes) -> None:
        """Continue the log in the store by what it does not have yet."""
        path = self._mirror.folder(followed.attempt) / _LOG
        have = path.stat().st_size if path.is_file() else 0
        begin, followed.taken = followed.taken, followed.taken + len(kept)
        data = kept[max(0, have - begin) :]
        if data:
            chunk = Chunk(
                attempt=followed.attempt,
                path=_LOG,
                mode="append",
                offset=max(begin, have),
                data=data,
                final=False,
                sha256="",
                size=followed.taken,
                mtime_ns=0,
            )
            for event in self._mirror.write(chunk):
                self._emit(event)

    def _say(self, followed: _Followed, job: RayJob) -> None:
        log = followed.log
        seen = AttemptSeen(
            node_id=job.driver_node_id or "",
            attempt=followed.attempt,
            claim=_claim(followed),
            started=log.started,
            facts=_facts(log),
            exit=self._exit(followed, job) if job.ended else None,
            runner_alive=not job.ended,
        )
        if seen != followed.seen:
            followed.seen = seen
            self._emit(seen)

    def _exit(self, followed: _Followed, job: RayJob) -> Exit | None:
        told = followed.log.exit
        ours = followed.attempt in self._stopped
        if told is not None:
            return Exit(**{**told, "by_ray": told["by_ray"] and not ours})
        return exit_by_ray(job, ours=ours)


def exit_by_ray(job: RayJob, *, ours: bool) -> Exit | None:
    """Return how an attempt ended by Ray's word alone, where its runner told nothing; None where Ray knows no more."""
    code = job.driver_exit_code
    if job.status == "FAILED" and (code is None or code < 0):
        return None
    known = {"SUCCEEDED": "completed", "FAILED": "exit_code", "STOPPED": "stopped"}
    return Exit(
        ended=known[job.status],  # type: ignore[typeddict-item]
        exit_code=code,
        signal="",
        message="",
        failed_rank=None,
        at=job.end_time / 1000 if job.end_time else time.time(),
        by_ray=job.status == "STOPPED" and not ours,
        killed=0,
        oom=False,
    )


def _claim(followed: _Followed) -> Claim | None:
    if not followed.log.begun:
        return None
    return Claim(epoch="told", pid=0, started_ticks=0, boot_id="", at=0.0)


def _facts(log: ToldLog) -> Facts | None:
    facts = log.facts
    if facts is None:
        return None
    left = [f"it left {log.left} on its node"] if log.left else []
    return Facts(**{**facts, "warnings": [*facts.get("warnings", []), _NO_FILES, *left]})
