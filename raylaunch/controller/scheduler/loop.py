"""The scheduler's loop: observe, admit, drive, reconcile. Requests of people come in through `JobService`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets as random_secrets
import signal
import time
from collections.abc import Callable, Coroutine

from raylaunch.controller.ray.jobs_api import RayJob
from raylaunch.controller.ray.protocol import (
    BridgeDown,
    BridgeEvent,
    BridgeUp,
    Grew,
    NodesChanged,
    ObservedAttempt,
    Stored,
    StoreProblem,
)
from raylaunch.controller.scheduler.attempt_context import AttemptContext, attempt_tag
from raylaunch.controller.scheduler.external_jobs import ExternalJobs
from raylaunch.controller.scheduler.finish import Finisher
from raylaunch.controller.scheduler.follow import Follower
from raylaunch.controller.scheduler.launch import AttemptLauncher
from raylaunch.controller.scheduler.queue import (
    Admit,
    Block,
    QueuePlan,
    active_allocations,
    node_capacities,
    plan_queue,
    with_drains,
)
from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.audit import DrainStore
from raylaunch.controller.store.backlog import GPUS, WaitDecision
from raylaunch.errors import ClusterError, NotFoundError, RaylaunchError, StorageError
from raylaunch.models.cluster import NodeView
from raylaunch.models.job import AttemptView
from raylaunch.models.states import Change, Reason

_log = logging.getLogger(__name__)

_TICK_S = 1.0
_MAX_BACKOFF_S = 60.0
"""Longest delay before failing work is retried."""
_POLL_PAUSE_FACTOR = 50
"""The pause between two polls of Ray's jobs, as a multiple of the poll's duration: Ray's response lists all jobs that
it remembers, and costs its dashboard half a millisecond per job."""
_MAX_POLL_PAUSE_S = 5.0
_FRESH_S = 5.0
"""Maximum age of the node data when jobs that need GPUs are placed."""
RECORDED_AHEAD = 50
"""Every change of the wait reason is recorded for this many jobs at the head of the queue. Further back it may change
with each job that starts or ends: there it is recorded once, when the job is queued, and computed when it is read."""
_RECORDED_AT_ONCE = 8
_STARTED_AT_ONCE = 8
_RESTART_AFTER_S = 4.0
_RESTART_EVERY_S = 20.0


class SchedulerLoop:
    """Admits queued jobs and keeps the records in line with what is observed."""

    def __init__(
        self, context: AttemptContext, artifacts: Artifacts, foreign: ExternalJobs, drains: DrainStore
    ) -> None:
        self._settings = context.settings
        self._records = context.records
        self._artifacts = artifacts
        self._bridge = context.bridge
        self._ray = context.ray
        self._observed = context.observed
        self._drains = drains
        self._launcher = AttemptLauncher(context)
        self._follower = Follower(context)
        self._finisher = Finisher(context)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._backoffs: dict[str, tuple[float, float]] = {}
        """Work that failed last time: when it is retried (monotonic), and the delay (seconds)."""
        self._foreign = foreign
        self._ray_silent_since: float | None = None
        self._restarted_at = 0.0

    async def run(self) -> None:
        """Run until cancelled. Jobs continue when it ends; the next `run` finds them again."""
        poll = asyncio.create_task(self._poll_ray(), name="poll ray")
        try:
            while True:
                self._tolerate_storage_error(self._step)
                if poll.done():
                    poll.result()
                await self._observed.wait(_TICK_S)
        finally:
            for task in [poll, *self._tasks.values()]:
                task.cancel()
            await asyncio.gather(poll, *self._tasks.values(), return_exceptions=True)

    def on_event(self, event: BridgeEvent) -> None:
        """Apply an event of the bridge. Called in the event loop; never blocks."""
        observed = self._observed
        match event:
            case BridgeUp():
                observed.bridge_up, observed.bridge_error, observed.refresh_needed = True, "", True
            case BridgeDown(why=why):
                observed.bridge_up, observed.bridge_error = False, why
            case NodesChanged():
                observed.refresh_needed = True
            case ObservedAttempt():
                observed.attempts[event.attempt] = event
                observed.notify_growth(event.attempt)
                self._clean_up_orphan(event)
            case StoreProblem(attempt=attempt, message=message):
                observed.store_problems.pop(attempt, None)
                if message:
                    observed.store_problems[attempt] = message
            case Stored(attempt=attempt, path=path, size=size, sha256=sha256):
                job, _, n = attempt.rpartition("-")
                self._artifacts.note(job, f"attempt-{n}/{path}", size=size, sha256=sha256)
                observed.notify_growth(attempt)
                return
            case Grew(attempt=attempt):
                observed.notify_growth(attempt)
                return
        observed.notify()

    # -- one step: nothing here blocks ---------------------------------------------------------------------------------

    def _step(self) -> None:
        if self._observed.refresh_needed and self._observed.bridge_up:
            self._background("nodes", self._refresh_nodes())
        for record in self._records.active():
            self._background(record.id, self._drive(record.id))
        for job in self._foreign.stopping():
            self._background(f"stop {job}", self._foreign.end(job))
        self._admit()

    def _tolerate_storage_error(self, work: Callable[[], None]) -> None:
        """Do `work`; if the store cannot be written, it is retried a second later."""
        try:
            work()
        except StorageError as error:
            self._observed.storage_error = error.message
            _log.warning("%s; retrying", error.message)

    def _admit(self) -> None:
        backlog = self._records.backlog
        if not backlog:
            return
        pause = self._pause()
        if pause is not None:
            self._observed.plan = QueuePlan(rest=pause)
            self._record_wait_reasons(self._observed.plan)
            return
        if self._observed.nodes_age > _FRESH_S and backlog.wants(GPUS):
            self._background("nodes", self._refresh_nodes())  # who uses the GPUs now? The next step follows
            return
        holdings = active_allocations(
            self._records.active(), released=self._observed.released, seen=self._observed.attempts
        )
        rooms = node_capacities(with_drains(self._observed.nodes, self._drains.now()))
        plan = plan_queue(backlog, rooms, holdings, groups=backlog.groups, down=self._observed.down)
        self._observed.plan = plan
        for admit in plan.admits[:_STARTED_AT_ONCE]:
            self._start(admit)
        if len(plan.admits) > _STARTED_AT_ONCE:
            asyncio.get_running_loop().call_soon(self._observed.notify)  # let other tasks run before the next start
        self._record_wait_reasons(plan)

    def _pause(self) -> Block | None:
        """Return why no job can start now, if so."""
        observed = self._observed
        if not observed.bridge_up:
            why = f"waiting for Ray: {observed.bridge_error or 'connecting'}"
            return Block(Reason.WAITING_FOR_RAY, lambda: why)
        if time.time() < observed.paused_until:
            paused = f"waiting: {observed.pause_reason}"
            return Block(Reason.WAITING_FOR_DRAIN, lambda: paused)
        return None

    def _start(self, admit: Admit) -> None:
        record = self._records.light(admit.job)
        n = len(record.attempts) + 1
        attempt = AttemptView(
            id=f"{record.id}-{n}", n=n, node=admit.hostname, node_id=admit.node_id, admitted_at=time.time()
        )
        earlier = {"environment": None, "log_tail": ()} if record.attempts else {}  # from the previous attempt
        self._records.update(
            record.id,
            kind="admitted",
            message=f"starting on {admit.hostname}",
            change=Change.ADMIT,
            reason=Reason.SENDING_CODE,
            attempts=(*record.attempts, attempt),
            epoch=random_secrets.token_hex(8),
            submitted_to_ray=False,
            **earlier,
        )
        self._background(record.id, self._drive(record.id))

    def _record_wait_reasons(self, plan: QueuePlan) -> None:
        """Record changed wait reasons, of a few jobs at a time."""
        backlog = self._records.backlog
        fresh = [ask for ask in backlog.unrecorded(_RECORDED_AT_ONCE) if plan.block(ask) is not None]
        blocks = {ask.job: plan.block(ask) for ask in (*fresh, *backlog.first(RECORDED_AHEAD))}
        changed = [
            WaitDecision(job, block.reason, block.message)
            for job, block in blocks.items()
            if block is not None and block.reason is not backlog.recorded_reason(job)
        ][:_RECORDED_AT_ONCE]
        if changed:
            self._records.record_wait_reasons(changed)
        backlog.mark_recorded(fresh)

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _background(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Run `work` unless work of this name is running, or its retry is not due yet."""
        if name in self._tasks or self._backoffs.get(name, (0.0, 0.0))[0] > time.monotonic():
            work.close()
            return
        task = asyncio.create_task(work, name=name)
        self._tasks[name] = task
        task.add_done_callback(lambda done: self._ended(name, done))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(name, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            backoff_s = min(max(2 * self._backoffs.get(name, (0.0, 0.0))[1], _TICK_S), _MAX_BACKOFF_S)
            self._backoffs[name] = (time.monotonic() + backoff_s, backoff_s)
            _log.error("%s failed; retrying in %.0f s", name, backoff_s, exc_info=error)
        else:
            self._backoffs.pop(name, None)
        self._observed.notify()

    async def _drive(self, job: str) -> None:
        """Drive the job's latest attempt until the job has ended or is queued again."""
        refused = ""
        try:
            if not self._records.light(job).submitted_to_ray:
                refused = await self._launcher.launch(job)
            if not refused:
                await self._follower.follow(job)
            await self._finisher.finish(job, refused)
        except StorageError as error:
            self._observed.storage_error = error.message
            await asyncio.sleep(_TICK_S)

    async def _refresh_nodes(self) -> None:
        self._observed.refresh_needed = False  # a change during the request triggers another one
        try:
            self._observed.set_nodes(_current(await self._bridge.nodes()))
        except ClusterError as error:
            self._observed.refresh_needed = True
            self._observed.nodes_at = time.monotonic()  # nothing newer is available, and no job waits for it
            _log.warning("%s; requesting the nodes again", error.message)
            await asyncio.sleep(_TICK_S)

    def _clean_up_orphan(self, seen: ObservedAttempt) -> None:
        """Clean up an attempt that no job waits for: an older one, or one whose job has ended or was removed."""
        job, _, n = seen.attempt.rpartition("-")
        try:
            record = self._records.light(job)
        except NotFoundError:
            record = None
        latest = record.attempts[-1].id if record is not None and record.attempts else ""
        if record is None or latest != seen.attempt or record.state.ended:
            self._background(f"clean up {seen.attempt}", self._clean_up(seen, keep=record is not None and n.isdigit()))

    async def _clean_up(self, seen: ObservedAttempt, *, keep: bool) -> None:
        tag = attempt_tag(self._settings, seen.attempt)
        try:
            await self._bridge.fence(seen.node_id, seen.attempt, tag)
            if not keep or await self._bridge.drain(seen.node_id, seen.attempt, 600):
                await self._bridge.forget(seen.node_id, seen.attempt)
                self._observed.attempts.pop(seen.attempt, None)
        except RaylaunchError as error:
            _log.warning("%s has not been removed from its node yet: %s", seen.attempt, error.message)

    # -- Ray ----------------------------------------------------------------------------------------------------------

    async def _poll_ray(self) -> None:
        while True:
            began = time.monotonic()
            try:
                if not self._observed.ray_version:
                    self._observed.ray_version = await self._ray.version()
                jobs = await self._ray.all()
                self._tolerate_storage_error(lambda: self._apply_ray_jobs(jobs))  # noqa: B023 -- called at once
            except ClusterError:
                self._observed.ray_answers = False
                self._restart_ray_if_silent()
                began = time.monotonic()
            await asyncio.sleep(min(max(_TICK_S, _POLL_PAUSE_FACTOR * (time.monotonic() - began)), _MAX_POLL_PAUSE_S))

    def _apply_ray_jobs(self, jobs: list[RayJob]) -> None:
        self._observed.ray_answers = True
        self._ray_silent_since = None
        seen = {job.submission_id or "": job for job in jobs}
        if seen != self._observed.ray_jobs:
            self._observed.ray_jobs = seen
            self._observed.notify()
        self._foreign.take(seen)

    def _restart_ray_if_silent(self) -> None:
        """Restart Ray if it has not responded for a while."""
        now = time.monotonic()
        self._ray_silent_since = self._ray_silent_since or now
        silent = now - self._ray_silent_since
        if not self._settings.revive or silent < _RESTART_AFTER_S or now - self._restarted_at < _RESTART_EVERY_S:
            return
        if "revive" in self._tasks:
            return
        _log.warning("Ray has not responded for %.0f s; restarting it", silent)
        self._background("revive", self._restart_ray())

    async def _restart_ray(self) -> None:
        """Run the command that restarts Ray, which the settings contain."""
        limit_s = self._settings.revive_limit_s
        process = await asyncio.create_subprocess_exec(
            *self._settings.revive, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = await asyncio.wait_for(process.wait(), limit_s)
        except asyncio.TimeoutError:
            _log.error("the command that restarts Ray did not finish within %.0f s; killing it", limit_s)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = await process.wait()
        self._restarted_at = time.monotonic()
        self._observed.ray_version = ""
        if status:
            _log.error("the command that restarts Ray exited with status %d: %s", status, self._settings.revive)


def _current(nodes: tuple[NodeView, ...]) -> tuple[NodeView, ...]:
    """Leave out dead nodes of machines that are alive: Ray lists nodes from before its restart permanently."""
    alive = {node.hostname for node in nodes if node.alive}
    return tuple(node for node in nodes if node.alive or node.hostname not in alive)
