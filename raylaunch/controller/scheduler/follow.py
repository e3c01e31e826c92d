"""Following an attempt until it has ended on its node, as far as can be observed."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from raylaunch.contract import Facts, StopWish
from raylaunch.controller.ray.protocol import ObservedAttempt
from raylaunch.controller.scheduler.attempt_context import NODE_LEASE_S, STEP_S, AttemptContext, latest, replaced
from raylaunch.controller.store.record import JobRecord
from raylaunch.errors import RaylaunchError
from raylaunch.models.job import EnvironmentFacts, WandbLink
from raylaunch.models.states import Change, JobState, Reason

_RAY_GRACE_S = 5.0
"""How long a runner may take to write its exit facts after Ray reports the end of the submission."""
_STOP_MARGIN_S = 20.0
_UNCLAIMED_S = 3.0
_RUN_ADDRESS = re.compile(r"https?://[\w.:\[\]-]{1,255}(?:/[\w.%~-]{1,200}){3,8}")


class Follower:
    """Follows attempts and forwards stop requests."""

    def __init__(self, context: AttemptContext) -> None:
        self._context = context

    async def follow(self, job: str) -> None:
        """Follow the attempt until it has ended on its node, as far as can be observed."""
        follow = _FollowState()
        while True:
            record = self._context.records.light(job)
            seen = self._context.observed.attempts.get(latest(record).id)
            if seen is not None and seen is not follow.recorded:
                record = record_facts(self._context, self._context.records.by_id(job), seen)
                follow.recorded = seen
            if self._has_ended(record, seen, follow):
                return
            await self._forward_stop(record, follow)
            await self._context.observed.wait(STEP_S)

    def _has_ended(self, record: JobRecord, seen: ObservedAttempt | None, follow: _FollowState) -> bool:
        now = time.monotonic()
        if seen is not None and seen.exit is not None:
            return True
        claimed = seen is not None and seen.claim is not None
        if seen is not None and claimed and not seen.runner_alive:
            return True
        if record.stop_wish is not None and follow.overdue(now, float(record.stop_wish["grace_s"]), claimed=claimed):
            return True
        attempt = latest(record)
        ray_job = self._context.observed.ray_jobs.get(attempt.id)
        if self._context.observed.ray_answers and ray_job is not None and ray_job.ended:
            follow.ray_ended_at = follow.ray_ended_at or now
            return not claimed or now - follow.ray_ended_at > _RAY_GRACE_S
        return self._lease_expired(record, follow, now)

    def _lease_expired(self, record: JobRecord, follow: _FollowState, now: float) -> bool:
        gone = self._context.node_lost(record)
        if gone != record.unreachable:
            self._context.records.update(record.id, kind="", unreachable=gone)
        follow.gone_since = (follow.gone_since or now) if gone else None
        return follow.gone_since is not None and now - follow.gone_since > NODE_LEASE_S

    async def _forward_stop(self, record: JobRecord, follow: _FollowState) -> None:
        """Ask the runner to stop; if it has not started, the fence prevents that it ever does."""
        if record.stop_wish is None or follow.sent_at is not None:
            return
        follow.stop_since = follow.stop_since or time.monotonic()
        attempt = latest(record)
        node_id = self._context.observed.node_of(attempt)
        if not node_id:
            return
        try:
            await self._context.bridge.stop(node_id, attempt.id, _wish(record))
        except RaylaunchError as error:
            self._context.set_message(
                record, Reason.STOP_REQUESTED, f"the stop request has not reached the node yet: {error.message}"
            )
        else:
            follow.sent_at = time.monotonic()


def record_facts(context: AttemptContext, record: JobRecord, seen: ObservedAttempt) -> JobRecord:
    """Record what is new about the attempt: that it is running, and facts of its environment."""
    attempt = latest(record)
    if seen.facts is not None and "python" in seen.facts:
        environment, link = _environment(seen.facts), _wandb(record.wandb, seen.facts)
        if (environment, link) != (record.environment, record.wandb):
            record = context.records.update(record.id, kind="", environment=environment, wandb=link)
    if seen.started is not None and attempt.started_at is None:
        started = seen.started
        runs = record.state is JobState.STARTING
        record = context.records.update(
            record.id,
            kind="running" if runs else "",
            message=f"running on {attempt.node}" if runs else None,
            change=Change.START if runs else None,
            reason=None if runs else record.reason,
            attempts=replaced(
                record,
                started_at=started["at"],
                pid=started["pid"],
                gpus=tuple(started["gpus"]),
                ranks=started.get("ranks", 1),  # an attempt that an older runner started does not say
            ),
            started_at=record.started_at or started["at"],
        )
    return record


@dataclass
class _FollowState:
    """What `Follower.follow` remembers between two checks."""

    recorded: ObservedAttempt | None = None
    """The latest observation that has been recorded."""
    ray_ended_at: float | None = None
    gone_since: float | None = None
    stop_since: float | None = None
    sent_at: float | None = None

    def overdue(self, now: float, grace_s: float, *, claimed: bool) -> bool:
        """Whether a stop has waited long enough: briefly if there is no runner, else grace period plus a margin."""
        if self.sent_at is not None and not claimed and now - self.sent_at > _UNCLAIMED_S:
            return True
        return self.stop_since is not None and now - self.stop_since > grace_s + _STOP_MARGIN_S


def _wish(record: JobRecord) -> StopWish:
    wish = record.stop_wish or {"grace_s": record.own_spec.grace_s}
    return StopWish(why="stopped", grace_s=float(wish["grace_s"]))


def _environment(facts: Facts) -> EnvironmentFacts:
    return EnvironmentFacts(
        python=facts.get("python", ""),
        version=facts.get("version", ""),
        wandb=facts.get("wandb", ""),
        torch=facts.get("torch", ""),
        packages=tuple(facts.get("packages", ())),
        warnings=tuple(facts.get("warnings", ())),
    )


def _address(url: str) -> str:
    """Return a run's URL if it is well-formed: a job can write its own facts."""
    return url if _RUN_ADDRESS.fullmatch(url) else ""


def _wandb(link: WandbLink | None, facts: Facts) -> WandbLink | None:
    """Return the job's runs, updated by this attempt; a URL remains if a later attempt is offline."""
    if link is None or "wandb_mode" not in facts:
        return link
    runs = tuple(dict.fromkeys((*link.runs, *facts.get("wandb_runs", ()))))
    found = {
        "mode": facts["wandb_mode"],
        "why": facts.get("wandb_why", link.why),
        "url": _address(facts.get("wandb_url", "")) or link.url,
        "run_id": link.run_id if link.run_id in runs else facts.get("wandb_run", "") or link.run_id,
        "runs": runs,
        "staged_bytes": facts.get("wandb_staged", 0) or link.staged_bytes,
    }
    return WandbLink.model_validate({**link.model_dump(), **found})
