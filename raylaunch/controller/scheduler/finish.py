"""Finishing an attempt: ensure that it has exited, collect its files, and record how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from raylaunch.agent.agent import FenceResult
from raylaunch.contract import FENCED
from raylaunch.controller.scheduler.attempt_context import (
    NODE_LEASE_S,
    STEP_S,
    AttemptContext,
    AttemptResult,
    attempt_tag,
    latest,
    replaced,
)
from raylaunch.controller.scheduler.diagnose import PUT_OFF, Evidence, Finding, after_drain, diagnose, retry_follows
from raylaunch.controller.scheduler.follow import record_facts
from raylaunch.controller.store.record import JobRecord
from raylaunch.errors import ClusterError, RaylaunchError
from raylaunch.models.job import AttemptView, EnvironmentFacts
from raylaunch.models.states import Change, Reason, Verdict

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_DRAIN_S = 60.0
_RAY_STATUS_S = 15.0
_ACTORS_S = 20.0


class Finisher:
    """Finishes attempts. An attempt keeps its resources until the fence has confirmed its exit."""

    def __init__(self, context: AttemptContext) -> None:
        self._context = context

    async def finish(self, job: str, refused: str) -> None:
        """Ensure that the attempt has exited, collect its files, and record how it ended."""
        record = self._context.records.by_id(job)
        attempt = latest(record)
        if record.own_spec.launcher == "ray":
            await self._end_actors(attempt)
        fenced = await self._fence(record)
        self._context.observed.released.add(attempt.id)
        self._context.observed.notify()
        replicated = fenced is not None and await self._drain(record)
        record = self._context.records.by_id(job)
        seen = self._context.observed.attempts.get(attempt.id)
        if seen is not None:
            record = record_facts(self._context, record, seen)
        result = await self._context.read_result(record)
        finding = await self._find(record, fenced, result, refused)
        ended_at = _ended_at(latest(record), fenced, now=time.time())
        self._end(record, finding, result, replicated=replicated, ended_at=ended_at)
        self._context.observed.released.discard(attempt.id)
        self._context.observed.notify_growth(attempt.id)
        self._context.observed.notify()
        if replicated:
            await self._forget(job)

    async def _end_actors(self, attempt: AttemptView) -> None:
        """Keep Ray from restarting a driver's actors; the fence ends their processes."""
        try:
            ray_job = await self._context.ray.get(attempt.id)
            if ray_job is not None and ray_job.job_id:
                ended = await self._context.bridge.call("end_actors", {"job_id": ray_job.job_id}, timeout_s=_ACTORS_S)
                if ended:
                    _log.info("%s left actors behind, which were killed: %s", attempt.id, ended)
        except RaylaunchError as error:
            _log.warning("the actors of %s may be restarted: %s", attempt.id, error.message)

    async def _on_node(self, attempt: AttemptView, work: Callable[[str], Awaitable[_Result | None]]) -> _Result | None:
        """Retry `work` on the attempt's node until it returns something. None if the node was lost for good."""
        gone_since: float | None = None
        while True:
            node_id = self._context.observed.node_of(attempt)
            if node_id:
                gone_since = None
                if (result := await work(node_id)) is not None:
                    return result
            elif self._context.observed.bridge_up:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > NODE_LEASE_S:
                    return None
            await self._context.observed.wait(STEP_S)

    async def _fence(self, record: JobRecord) -> FenceResult | None:
        """End what is left of the attempt on its node."""
        attempt = latest(record)
        tag = attempt_tag(self._context.settings, attempt.id)

        async def fence(node_id: str) -> FenceResult | None:
            try:
                return await self._context.bridge.fence(node_id, attempt.id, tag)
            except RaylaunchError as error:
                problem = f"its processes on {attempt.node} cannot be ended yet: {error.message}"
                self._context.set_message(record, record.reason, problem)
                return None

        return await self._on_node(attempt, fence)

    async def _drain(self, record: JobRecord) -> bool:
        """Wait until the attempt's files are in the store. False if the node was lost meanwhile."""
        attempt = latest(record)

        async def drain(node_id: str) -> bool | None:
            try:
                if await self._context.bridge.drain(node_id, attempt.id, _DRAIN_S):
                    return True
                problem = self._context.observed.store_problems.get(attempt.id, "copying its files to the store")
            except RaylaunchError as error:
                problem = f"its files on {attempt.node} cannot be copied yet: {error.message}"
            self._context.set_message(record, record.reason, problem)
            return None

        return await self._on_node(attempt, drain) is not None

    async def _forget(self, job: str) -> None:
        """Delete the attempt on its node; a failure is made up for when the agent reports the attempt again."""
        record = self._context.records.by_id(job)
        attempt = latest(record)
        node_id = self._context.observed.node_of(attempt)
        try:
            if node_id:
                await self._context.bridge.forget(node_id, attempt.id, again=not record.state.ended)
                self._context.observed.attempts.pop(attempt.id, None)
        except RaylaunchError as error:
            _log.info("%s has not been removed from its node yet: %s", attempt.id, error.message)

    async def _find(
        self, record: JobRecord, fenced: FenceResult | None, result: AttemptResult, refused: str
    ) -> Finding:
        if refused and not (fenced is not None and fenced.exit is not None):
            if self._context.node_lost(record):
                return Finding(Change.LOSE, Reason.NODE_LOST, refused)
            return Finding(Change.FAIL, Reason.RAY_REFUSED, refused)
        attempt = latest(record)
        exit_ = fenced.exit if fenced is not None else None
        seen = self._context.observed.attempts.get(attempt.id)
        restarted = self._context.observed.bridge_up and self._context.observed.node(attempt.node_id) is None
        if exit_ is not None and exit_["by_ray"] and record.stop_wish is None and not restarted:
            restarted = not await self._stopped_with_ray(attempt)
        ray_job = self._context.observed.ray_jobs.get(attempt.id)
        claim = fenced.claim if fenced is not None else (seen.claim if seen is not None else None)
        return diagnose(
            Evidence(
                exit=exit_,
                claimed=claim is not None and claim["epoch"] != FENCED,
                stop_wanted=record.stop_wish is not None,
                node_alive=fenced is not None,
                ray_message=(ray_job.message or "") if ray_job is not None else "",
                ray_lost=restarted,
                log_tail=result.log_tail,
                left_out_by=record.pack.ignored_by if record.pack else (),
            )
        )

    async def _stopped_with_ray(self, attempt: AttemptView) -> bool:
        """Whether a SIGTERM from outside was a stop through Ray, as Ray confirms; otherwise Ray itself went down."""
        deadline = time.monotonic() + _RAY_STATUS_S
        while time.monotonic() < deadline:
            try:
                ray_job = await self._context.ray.get(attempt.id)
            except ClusterError:
                return False
            if ray_job is None or ray_job.ended:
                return ray_job is not None and ray_job.status == "STOPPED"
            await self._context.observed.wait(STEP_S)
        return True

    def _end(
        self, record: JobRecord, finding: Finding, result: AttemptResult, *, replicated: bool, ended_at: float
    ) -> None:
        finding = after_drain(finding, record.reason) if record.again else finding
        attempts = replaced(
            record,
            ended_at=ended_at,
            exit_code=finding.exit_code,
            signal=finding.signal,
            failed_rank=finding.failed_rank,
            reason=finding.reason,
            message=finding.message,
            replicated=replicated,
        )
        free = finding.reason.verdict is Verdict.RETRY_FREE
        again = finding.reason in PUT_OFF or (
            record.stop_wish is None
            and retry_follows(
                finding.reason,
                attempts=len(attempts),
                free_retries=record.free_retries,
                retries=record.own_spec.retries,
            )
        )
        common: dict[str, Any] = {
            "attempts": attempts,
            "reason": finding.reason,
            "log_tail": () if finding.change is Change.SUCCEED else result.log_tail,
            "outputs": result.outputs,
            "output_bytes": result.output_bytes,
            "last_metrics": result.last_metrics,
            "progress": result.progress,
            "unreachable": False,
            **with_warnings(record, result.warnings),
        }
        if again:
            self._context.records.update(
                record.id,
                kind="retry",
                message=f"{finding.message}; retrying",
                change=Change.REQUEUE,
                free_retries=record.free_retries + (1 if free else 0),
                submitted_to_ray=False,
                stop_wish=None,
                again=False,
                **common,
            )
            return
        self._context.records.update(
            record.id, kind="ended", message=finding.message, change=finding.change, ended_at=ended_at, **common
        )
        self._context.secrets.forget_job(record.id)


def with_warnings(record: JobRecord, warnings: tuple[str, ...]) -> dict[str, EnvironmentFacts]:
    """Return the job's environment facts with these warnings added, each once."""
    facts = record.environment or EnvironmentFacts()
    new = tuple(warning for warning in warnings if warning not in facts.warnings)
    return {"environment": facts.model_copy(update={"warnings": (*facts.warnings, *new)})} if new else {}


def _ended_at(attempt: AttemptView, fenced: FenceResult | None, *, now: float) -> float:
    """Return when an attempt ended according to its runner: its exit facts, or else its last heartbeat.

    The controller may have been down meanwhile. Both use the node's clock, as the attempt's start does.
    """
    exited_at = fenced.exit["at"] if fenced is not None and fenced.exit is not None else None
    beat_at = fenced.beat_at if fenced is not None else None
    known = exited_at if exited_at is not None else beat_at
    return now if known is None else max(known, attempt.started_at or known)
