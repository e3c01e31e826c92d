"""External jobs, which were submitted with ``ray job submit``: observed in Ray's list, recorded, stopped on request."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import ValidationError

from raylaunch.controller.ray.bridge import RayBridge
from raylaunch.controller.ray.jobs_api import SUPERVISOR_LOST, RayJob, RayJobs
from raylaunch.controller.scheduler.attempt_context import NODE_LEASE_S
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.record import JobRecord, StopWishModel
from raylaunch.errors import ConflictError, RaylaunchError
from raylaunch.models.job import AttemptView, JobView
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import JobState, Reason

_log = logging.getLogger(__name__)

_STATES = {
    "PENDING": JobState.QUEUED,
    "RUNNING": JobState.RUNNING,
    "SUCCEEDED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
    "STOPPED": JobState.STOPPED,
}
_ENTRYPOINT_CHARS = 4000
_MESSAGE_CHARS = 300
_TAIL_LINES = 30
_AGAIN_S = 5.0
_BEFORE_TAIL = ", last available logs"


@dataclass(frozen=True)
class SubmissionPlace:
    """Where a submission is running or ran."""

    hostname: str = ""
    """Empty if it never started, or if that is unknown."""
    lost: bool = False
    """Whether that node is not in the cluster now."""
    lost_for_good: bool = False
    """Whether it has been missing for longer than a restart of Ray takes; Ray itself may never notice."""


def external_view(job: RayJob, *, where: SubmissionPlace, now: float, before: JobRecord | None = None) -> JobView:
    """Return Ray's view of a submission as a `JobView`, with one attempt once it has started.

    Args:
        job: Ray's record.
        where: where it is running or ran.
        now: seconds since the epoch.
        before: its current record, which has the stop request if there is one.
    """
    identity = job.submission_id or ""
    began = job.start_time / 1000 if job.start_time else now
    state, reason = _state_of(job, where, asked_to_stop=before is not None and before.stop_wish is not None)
    ended = job.end_time / 1000 if job.end_time else now if state.ended else None
    message, tail = _split_message(job.message or "")
    entrypoint = job.entrypoint[:_ENTRYPOINT_CHARS]
    if before is not None and before.stop_wish is not None and state in {JobState.STOPPING, JobState.STOPPED}:
        message = before.message
    return JobView(
        id=identity,
        name=JobSpec.model_construct(entrypoint=entrypoint or identity).display_name,
        owner="",
        state=state,
        reason=reason,
        message=f"its node {where.hostname or job.driver_node_id} was lost" if reason is Reason.NODE_LOST else message,
        foreign=True,
        entrypoint=entrypoint,
        created_at=began,
        started_at=began if job.driver_node_id else None,
        ended_at=ended,
        updated_at=ended or now,
        unreachable=where.lost and not state.ended,
        attempts=(_attempt(job, where.hostname, began, ended),) if job.driver_node_id else (),
        log_tail=tail,
    )


def _state_of(job: RayJob, where: SubmissionPlace, *, asked_to_stop: bool) -> tuple[JobState, Reason | None]:
    """Return state and reason. A pending job that was killed counts as failed in Ray, and as stopped here."""
    state = _STATES.get(job.status, JobState.RUNNING)
    killed = state is JobState.FAILED and (job.error_type or "").startswith(SUPERVISOR_LOST)
    gone = where.lost_for_good and not state.ended
    if asked_to_stop and (killed or gone or state is JobState.STOPPED):
        return JobState.STOPPED, Reason.STOP_REQUESTED
    if asked_to_stop and not state.ended:
        return JobState.STOPPING, Reason.STOP_REQUESTED
    if gone:
        return JobState.LOST, Reason.NODE_LOST
    if killed and where.lost:
        return state, Reason.NODE_LOST
    code = job.driver_exit_code
    ended = {
        JobState.SUCCEEDED: Reason.COMPLETED,
        JobState.STOPPED: Reason.STOPPED_BY_RAY,
        JobState.FAILED: None if code is None else Reason.SIGNAL if code < 0 else Reason.EXIT_CODE,
    }
    return state, ended.get(state)


def _split_message(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the first line of Ray's message, and the last lines of the log or traceback that follows it."""
    first, _, rest = text.strip().partition("\n")
    message = first.partition(_BEFORE_TAIL)[0]
    return message[:_MESSAGE_CHARS], tuple(line[:2000] for line in rest.splitlines()[-_TAIL_LINES:])


def _attempt(job: RayJob, hostname: str, began: float, ended: float | None) -> AttemptView:
    code = job.driver_exit_code
    killed = code is not None and code < 0
    return AttemptView(
        id=job.submission_id or "",
        n=1,
        node=hostname,
        node_id=job.driver_node_id or "",
        admitted_at=began,
        started_at=began,
        ended_at=ended,
        exit_code=None if killed else code,
        signal=_signal_name(-code) if code is not None and killed else "",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class ExternalJobs:
    """Keeps the records of external jobs in line with Ray, and stops or removes them on request.

    No runner of raylaunch supervises such a job: Ray stops it, with Ray's own grace period, and its report counts.
    """

    def __init__(self, *, records: Records, ray: RayJobs, bridge: RayBridge, observed: ObservedState) -> None:
        self._records = records
        self._ray = ray
        self._bridge = bridge
        self._observed = observed
        self._written: dict[str, tuple[RayJob, SubmissionPlace]] = {}
        self._lost_since: dict[str, float] = {}
        self._without_actor: set[str] = set()

    def take(self, jobs: Mapping[str, RayJob]) -> None:
        """Record the changes in Ray's list of jobs; a job that Ray has forgotten has ended.

        Raises:
            StorageError: it cannot be written.
        """
        for name, job in jobs.items():
            seen = (job, self._where(job))
            if not (job.metadata or {}).get("raylaunch_job") and self._written.get(name) != seen:
                try:
                    self._write(name, job, seen[1])
                except (ConflictError, ValidationError) as error:
                    _log.warning("the external job %r cannot be shown: %s", name, error)
                self._written[name] = seen
        for gone in self._written.keys() - jobs.keys():
            del self._written[gone]
            self._lost_since.pop(gone, None)
        for record in self._records.foreign_unfinished():
            if record.id not in jobs:
                forgotten = "Ray was restarted and no longer knows the job"
                self._write_ended(record, JobState.LOST, Reason.RAY_LOST, forgotten)

    def stopping(self) -> list[str]:
        """Return the jobs with a stop request that have not ended yet."""
        return [record.id for record in self._records.foreign_unfinished() if record.stop_wish is not None]

    def stop(self, record: JobRecord, *, grace_s: float | None, person: str) -> JobView:
        """Record a stop request; `end` carries it out, however long Ray is down.

        Args:
            record: the job.
            grace_s: the requested time between SIGTERM and SIGKILL; Ray only has its own, usually 3 s.
            person: who requests it.

        Raises:
            ConflictError: it has ended.
            StorageError: it cannot be written.
        """
        if record.state.ended:
            msg = f"{record.id} has ended already: {record.state.value}"
            raise ConflictError(msg, hint=f"raylaunch show {record.id}")
        wish = StopWishModel(why="stopped", grace_s=0)
        how = "" if grace_s is None else ", with Ray's own grace period"
        how = how if record.attempts else " before it started"
        view = record.view().model_copy(
            update={
                "state": JobState.STOPPING,
                "reason": Reason.STOP_REQUESTED,
                "message": f"stop requested by {person}{how}",
                "updated_at": time.time(),
            }
        )
        stopping = self._records.put_foreign(view, stop_wish=wish)
        self._observed.notify()
        return stopping.view()

    async def end(self, job: str) -> None:
        """Try to end a job, once; called again until it has ended.

        Ray stops a running job. A pending one it only marks, so that it starts and stops once resources are free,
        perhaps in days: there the waiting actor is killed.
        """
        try:
            seen = await self._ray.get(job)
            if seen is not None and seen.status == "PENDING":
                if not await self._bridge.call("kill_waiting", {"submission": job}, timeout_s=30):
                    self._no_waiting_actor(job)
            elif seen is not None and not seen.ended:
                await self._ray.stop(job)
        except RaylaunchError as error:
            _log.warning("%s cannot be stopped yet: %s", job, error.message)
        await asyncio.sleep(_AGAIN_S)

    async def remove(self, record: JobRecord) -> None:
        """Remove an ended job from Ray and from the records. Its log stays in the folder of Ray's session.

        Raises:
            ConflictError: it has not ended.
            ClusterDownError: Ray does not respond.
            StorageError: it cannot be written.
        """
        record.require_ended()
        await self._ray.delete(record.id)
        self._records.delete(record.id)

    def _no_waiting_actor(self, job: str) -> None:
        """Record a pending job as ended if it had no actor twice in a row: Ray was restarted meanwhile."""
        if job not in self._without_actor:
            self._without_actor.add(job)
            return
        self._without_actor.discard(job)
        record = self._records.foreign(job)
        if record is not None and not record.state.ended:
            self._write_ended(record, JobState.STOPPED, Reason.STOP_REQUESTED, record.message)

    def _where(self, job: RayJob) -> SubmissionPlace:
        node_id = job.driver_node_id
        if not node_id or not self._observed.nodes:
            return SubmissionPlace()
        here = self._observed.node(node_id)
        name = job.submission_id or ""
        if here is not None:
            self._lost_since.pop(name, None)
            return SubmissionPlace(hostname=here.hostname)
        since = self._lost_since.setdefault(name, time.monotonic())
        return SubmissionPlace(lost=True, lost_for_good=time.monotonic() - since > NODE_LEASE_S)

    def _write(self, name: str, job: RayJob, where: SubmissionPlace) -> None:
        before = self._records.foreign(name)
        if before is not None and before.attempt is not None and not where.hostname:
            where = replace(where, hostname=before.attempt.node)
        view = external_view(job, where=where, now=time.time(), before=before)
        known_end = before is not None and before.state.ended and before.reason is not Reason.RAY_LOST
        if before is None or not known_end or before.created_at != view.created_at:
            self._records.put_foreign(view)

    def _write_ended(self, record: JobRecord, state: JobState, reason: Reason, message: str) -> None:
        now = time.time()
        end = {
            "state": state,
            "reason": reason,
            "message": message,
            "unreachable": False,
            "ended_at": now,
            "updated_at": now,
            "attempts": tuple(attempt.model_copy(update={"ended_at": now}) for attempt in record.attempts),
        }
        self._records.put_foreign(record.view().model_copy(update=end))
