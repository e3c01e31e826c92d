"""One attempt from its admission to its end: send, submit, follow, fence, collect, diagnose.

Every step may run twice: a controller that was killed starts again at the first step and finds what is done already.
What is irreversible is guarded elsewhere: Ray refuses a known submission id, and a runner claims its attempt first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from raylaunch.controller.attempt_spec import attempt_spec, attempt_tag
from raylaunch.controller.diagnose import Evidence, Finding, diagnose, retry_follows
from raylaunch.controller.link import AttemptSeen, Fenced, Link
from raylaunch.controller.queue import CPUS, GPUS, MEMORY, needs
from raylaunch.controller.ray_jobs import RayJobs, Submission
from raylaunch.controller.records import JobRecord, Records
from raylaunch.controller.rooms import asked
from raylaunch.controller.secret_store import SecretStore
from raylaunch.controller.settings import Settings
from raylaunch.controller.sight import Sight
from raylaunch.errors import ClusterError, ConflictError, NotFoundError, RaylaunchError, StorageError, TransferError
from raylaunch.reasons import Reason, Verdict
from raylaunch.runner.contract import StopWish
from raylaunch.state import AttemptView, Change, EnvironmentFacts, JobState, Progress

_log = logging.getLogger(__name__)

_STEP_S = 1.0
_RAY_GRACE_S = 5.0
"""How long a runner may still write its exit facts after Ray says that the submission is over."""
_NODE_LEASE_S = 60.0
"""How long an attempt whose node is gone may still turn up on another (a restarted Ray gives its node a new id)."""
_STOP_MARGIN_S = 20.0
_SETTLE_S = 60.0
_RAY_WORD_S = 15.0
_TRANSFERS = 3
_FENCED = "fenced"
WANDB_KEY = "WANDB_API_KEY"
"""Sent to the node when it is set, whether or not a job names it: with it, a job tracks on-line."""


@dataclass(frozen=True)
class Leavings:
    """What an attempt left in the store, as the record keeps it."""

    log_tail: tuple[str, ...]
    outputs: int
    output_bytes: int
    last_metrics: dict[str, float]
    progress: Progress | None = None


class Driver:
    """Drives attempts. One `drive` runs for each job whose state is active."""

    def __init__(  # noqa: PLR0913 -- the parts that an attempt touches, all named
        self,
        *,
        settings: Settings,
        records: Records,
        secrets: SecretStore,
        link: Link,
        ray: RayJobs,
        sight: Sight,
        leavings: Callable[[JobRecord], Awaitable[Leavings]],
    ) -> None:
        self._settings = settings
        self._records = records
        self._secrets = secrets
        self._link = link
        self._ray = ray
        self._sight = sight
        self._leavings = leavings

    async def drive(self, job: str) -> None:
        """Drive the job's latest attempt until the job has ended or waits again."""
        refused = ""
        if not self._records.get(job).submitted_to_ray:
            refused = await self._send(job)
        if not refused:
            await self._until_over(job)
        await self._finish(job, refused)

    # -- sending ------------------------------------------------------------------------------------------------------

    async def _send(self, job: str) -> str:
        """Bring code and runner to the node, and submit. Returns why it can never start, or nothing."""
        transfers = 0
        while True:
            record = self._records.get(job)
            if record.stop_wish is not None:
                return ""
            if self._gone(record):
                return "its node left the cluster before it started"
            try:
                await self._send_once(record)
            except ConflictError as error:
                return error.message
            except TransferError as error:
                transfers += 1
                if transfers >= _TRANSFERS:
                    return error.message
            except (ClusterError, StorageError, NotFoundError) as error:
                self._say(record, _waiting_reason(error), error.message)
            else:
                return ""
            await self._sight.changed(_STEP_S)

    async def _send_once(self, record: JobRecord) -> None:
        attempt = _latest(record)
        wanted = asked(record)
        secrets = self._secrets.for_job(record.id, {*wanted.secrets, WANDB_KEY})
        missing = sorted(set(wanted.secrets) - set(secrets))
        if missing:
            msg = f"the secret {missing[0]} is not set any more"
            raise ConflictError(msg)
        spec = attempt_spec(wanted, job=record.id, n=attempt.n, epoch=record.epoch, settings=self._settings)
        prepared = await self._link.prepare(attempt.node_id, spec=spec, package=record.package, secrets=secrets)
        await self._ray.submit(_submission(record, attempt, prepared.command))
        self._records.update(record.id, kind="", submitted_to_ray=True)

    # -- following ----------------------------------------------------------------------------------------------------

    async def _until_over(self, job: str) -> None:
        """Follow the attempt until it is over on its node, as far as can be seen."""
        follow = _Following()
        while True:
            record = self._records.get(job)
            attempt = _latest(record)
            seen = self._sight.attempts.get(attempt.id)
            if seen is not None:
                record = self._note(record, seen)
            if self._over(record, seen, follow):
                return
            await self._pass_on_stop(record, seen, follow)
            await self._sight.changed(_STEP_S)

    def _over(self, record: JobRecord, seen: AttemptSeen | None, follow: _Following) -> bool:
        now = time.monotonic()
        if seen is not None and seen.exit is not None:
            return True
        claimed = seen is not None and seen.claim is not None
        if seen is not None and claimed and not seen.runner_alive:
            return True
        if record.stop_wish is not None and follow.overdue(now, float(record.stop_wish["grace_s"]), claimed=claimed):
            return True
        attempt = _latest(record)
        ray_job = self._sight.ray_jobs.get(attempt.id)
        if self._sight.ray_answers and ray_job is not None and ray_job.ended:
            follow.ray_ended_at = follow.ray_ended_at or now
            return not claimed or now - follow.ray_ended_at > _RAY_GRACE_S
        return self._lease_is_over(record, follow, now)

    def _lease_is_over(self, record: JobRecord, follow: _Following, now: float) -> bool:
        gone = self._gone(record)
        if gone != record.unreachable:
            self._records.update(record.id, kind="", unreachable=gone)
        follow.gone_since = (follow.gone_since or now) if gone else None
        return follow.gone_since is not None and now - follow.gone_since > _NODE_LEASE_S

    def _gone(self, record: JobRecord) -> bool:
        """Whether Ray answers, and the attempt's node is not among its nodes."""
        sight = self._sight
        return sight.link_up and bool(sight.nodes) and not self._node_of(_latest(record))

    def _note(self, record: JobRecord, seen: AttemptSeen) -> JobRecord:
        """Write down what is new about the attempt: where it is, that it runs, what the runner found."""
        attempt = _latest(record)
        if seen.facts is not None and record.environment is None and "python" in seen.facts:
            link = record.wandb
            if link is not None and "wandb_mode" in seen.facts:
                link = link.model_copy(
                    update={"mode": seen.facts["wandb_mode"], "why": seen.facts.get("wandb_why", link.why)}
                )
            record = self._records.update(record.id, kind="", environment=_environment(seen), wandb=link)
        if seen.started is not None and record.state is JobState.STARTING:
            started = seen.started
            attempts = _replaced(record, started_at=started["at"], pid=started["pid"], gpus=tuple(started["gpus"]))
            record = self._records.update(
                record.id,
                kind="running",
                message=f"runs on {attempt.node}",
                change=Change.START,
                reason=None,
                attempts=attempts,
                started_at=record.started_at or started["at"],
            )
        return record

    async def _pass_on_stop(self, record: JobRecord, seen: AttemptSeen | None, follow: _Following) -> None:
        """Tell the runner to stop; where there is none yet, the fence of `_finish` makes that there never will be."""
        if record.stop_wish is None or follow.told:
            return
        follow.stop_since = follow.stop_since or time.monotonic()
        if seen is None or seen.claim is None:
            return
        try:
            await self._link.stop(seen.node_id, seen.attempt, _wish(record))
        except ClusterError as error:
            self._say(record, Reason.STOP_REQUESTED, f"the stop has not reached the node yet: {error.message}")
        else:
            follow.told = True

    # -- finishing ----------------------------------------------------------------------------------------------------

    async def _finish(self, job: str, refused: str) -> None:
        """Prove that nothing of the attempt is left, collect what it left behind, and say how it ended."""
        record = self._records.get(job)
        attempt = _latest(record)
        fenced = await self._fence(record)
        self._sight.released.add(attempt.id)
        self._sight.ring()
        replicated = fenced is not None and await self._settle(record)
        record = self._records.get(job)
        leavings = await self._leavings(record)
        finding = await self._find(record, fenced, leavings, refused)
        self._end(record, finding, leavings, replicated=replicated)
        self._sight.released.discard(attempt.id)
        self._sight.ring()

    async def _fence(self, record: JobRecord) -> Fenced | None:
        """End what is left of the attempt on its node. None when the node is gone, and its lease with it."""
        attempt = _latest(record)
        gone_since: float | None = None
        while True:
            node_id = self._node_of(attempt)
            if node_id:
                gone_since = None
                try:
                    return await self._link.fence(node_id, attempt.id, attempt_tag(self._settings, attempt.id))
                except RaylaunchError as error:
                    self._say(record, record.reason, f"cannot be ended on {attempt.node} yet: {error.message}")
            elif self._sight.link_up:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > _NODE_LEASE_S:
                    return None
            await self._sight.changed(_STEP_S)

    def _node_of(self, attempt: AttemptView) -> str:
        """The id of the node alive where the attempt is, or nothing.

        That is where it was seen last, else where it was sent; and when Ray was restarted there, the new node on the
        same machine.
        """
        seen = self._sight.attempts.get(attempt.id)
        for node_id in (seen.node_id if seen is not None else "", attempt.node_id):
            if node_id and self._sight.node(node_id) is not None:
                return node_id
        return next((node.id for node in self._sight.ready_nodes() if node.hostname == attempt.node), "")

    async def _settle(self, record: JobRecord) -> bool:
        """Wait until the attempt's files are in the store. False when the node went away meanwhile."""
        attempt = _latest(record)
        gone_since: float | None = None
        while True:
            node_id = self._node_of(attempt)
            if node_id:
                gone_since = None
                if await self._settle_once(record, node_id):
                    return True
            elif self._sight.link_up:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > _NODE_LEASE_S:
                    return False
            await self._sight.changed(_STEP_S)

    async def _settle_once(self, record: JobRecord, node_id: str) -> bool:
        attempt = _latest(record)
        try:
            if await self._link.settle(node_id, attempt.id, _SETTLE_S):
                return True
            problem = self._sight.store_problems.get(attempt.id, "its files are on the way to the store")
        except RaylaunchError as error:
            problem = f"its files are still on {attempt.node}: {error.message}"
        self._say(record, record.reason, problem)
        return False

    async def _find(self, record: JobRecord, fenced: Fenced | None, leavings: Leavings, refused: str) -> Finding:
        if refused and not (fenced is not None and fenced.exit is not None):
            if self._gone(record):
                return Finding(Change.LOSE, Reason.NODE_LOST, refused)
            return Finding(Change.FAIL, Reason.RAY_REFUSED, refused)
        attempt = _latest(record)
        exit_ = fenced.exit if fenced is not None else None
        seen = self._sight.attempts.get(attempt.id)
        restarted = self._sight.link_up and self._sight.node(attempt.node_id) is None
        if exit_ is not None and exit_["by_ray"] and record.stop_wish is None and not restarted:
            restarted = not await self._stopped_with_ray(attempt)
        ray_job = self._sight.ray_jobs.get(attempt.id)
        claim = fenced.claim if fenced is not None else (seen.claim if seen is not None else None)
        return diagnose(
            Evidence(
                exit=exit_,
                claimed=claim is not None and claim["epoch"] != _FENCED,
                stop_wanted=record.stop_wish is not None,
                node_alive=fenced is not None,
                ray_message=(ray_job.message or "") if ray_job is not None else "",
                ray_lost=restarted,
                log_tail=leavings.log_tail,
            )
        )

    async def _stopped_with_ray(self, attempt: AttemptView) -> bool:
        """A SIGTERM from outside is a person's stop only if Ray says so too; else Ray went down under the attempt."""
        deadline = time.monotonic() + _RAY_WORD_S
        while time.monotonic() < deadline:
            try:
                ray_job = await self._ray.get(attempt.id)
            except ClusterError:
                return False
            if ray_job is None or ray_job.ended:
                return ray_job is not None and ray_job.status == "STOPPED"
            await self._sight.changed(_STEP_S)
        return True

    def _end(self, record: JobRecord, finding: Finding, leavings: Leavings, *, replicated: bool) -> None:
        now = time.time()
        attempts = _replaced(
            record,
            ended_at=now,
            exit_code=finding.exit_code,
            signal=finding.signal,
            reason=finding.reason,
            message=finding.message,
            replicated=replicated,
        )
        free = finding.reason.verdict is Verdict.RETRY_FREE
        again = record.stop_wish is None and retry_follows(
            finding.reason, attempts=len(attempts), free_retries=record.free_retries, retries=asked(record).retries
        )
        common: dict[str, Any] = {
            "attempts": attempts,
            "reason": finding.reason,
            "log_tail": () if finding.change is Change.SUCCEED else leavings.log_tail,
            "outputs": leavings.outputs,
            "output_bytes": leavings.output_bytes,
            "last_metrics": leavings.last_metrics,
            "progress": leavings.progress,
            "unreachable": False,
        }
        if again:
            self._records.update(
                record.id,
                kind="retry",
                message=f"{finding.message}; another attempt follows",
                change=Change.REQUEUE,
                free_retries=record.free_retries + (1 if free else 0),
                submitted_to_ray=False,
                **common,
            )
            return
        self._records.update(
            record.id, kind="ended", message=finding.message, change=finding.change, ended_at=now, **common
        )
        self._secrets.forget_job(record.id)

    # -- small things -------------------------------------------------------------------------------------------------

    def _say(self, record: JobRecord, reason: Reason | None, message: str) -> None:
        """Set the sentence beside the state, once for each new sentence."""
        now = self._records.get(record.id)
        if now.message != message or now.reason != reason:
            self._records.update(record.id, kind="", message=message, reason=reason)


@dataclass
class _Following:
    """What one `_until_over` remembers between two looks."""

    ray_ended_at: float | None = None
    gone_since: float | None = None
    stop_since: float | None = None
    told: bool = False

    def overdue(self, now: float, grace_s: float, *, claimed: bool) -> bool:
        """Whether a stop has waited long enough: at once where nobody claimed, else past grace and a margin."""
        if self.stop_since is None:
            return False
        return not claimed or now - self.stop_since > grace_s + _STOP_MARGIN_S


def _latest(record: JobRecord) -> AttemptView:
    return record.attempts[-1]


def _replaced(record: JobRecord, **fields: object) -> tuple[AttemptView, ...]:
    return (*record.attempts[:-1], record.attempts[-1].model_copy(update=fields))


def _wish(record: JobRecord) -> StopWish:
    wish = record.stop_wish or {"grace_s": asked(record).grace_s}
    return StopWish(why="stopped", grace_s=float(wish["grace_s"]))


def _waiting_reason(error: RaylaunchError) -> Reason:
    return Reason.DISK_FULL if isinstance(error, StorageError) else Reason.WAITING_FOR_RAY


def _environment(seen: AttemptSeen) -> EnvironmentFacts:
    facts = seen.facts or {}
    return EnvironmentFacts(
        python=facts.get("python", ""),
        version=facts.get("version", ""),
        wandb=facts.get("wandb", ""),
        torch=facts.get("torch", ""),
        packages=tuple(facts.get("packages", ())),
        warnings=tuple(facts.get("warnings", ())),
    )


def _submission(record: JobRecord, attempt: AttemptView, command: str) -> Submission:
    amounts = needs(asked(record))
    return Submission(
        id=attempt.id,
        entrypoint=command,
        node_id=attempt.node_id,
        gpus=amounts.pop(GPUS, 0),
        cpus=amounts.pop(CPUS, 0),
        memory=int(amounts.pop(MEMORY, 0)),
        custom=amounts,
        env_vars={"RAY_JOB_STOP_WAIT_TIME_S": str(int(asked(record).grace_s + 10))},
        metadata={"raylaunch_job": record.id, "name": record.name, "owner": record.owner},
    )
