"""Launching an attempt: its code and runner are sent to the node, and it is submitted to Ray."""

from __future__ import annotations

import asyncio

from raylaunch.agent.job_dir import ReadyAttempt
from raylaunch.controller.ray.jobs_api import Submission
from raylaunch.controller.scheduler.attempt_context import STEP_S, AttemptContext, attempt_spec, latest
from raylaunch.controller.store.backlog import CPUS, GPUS, MEMORY, required_amounts
from raylaunch.controller.store.record import JobRecord
from raylaunch.errors import ClusterError, ConflictError, NotFoundError, RaylaunchError, StorageError
from raylaunch.models.job import AttemptView
from raylaunch.models.states import Reason
from raylaunch.tracking.run_file import earlier_runs

_MAX_FAILURES = 3
WANDB_KEY = "WANDB_API_KEY"
"""Sent to the node if it is set, even if the job does not name it: with it, a job tracks online."""


class AttemptLauncher:
    """Launches attempts. Every step may run again."""

    def __init__(self, context: AttemptContext) -> None:
        self._context = context

    async def launch(self, job: str) -> str:
        """Prepare the attempt on its node and submit it. Return why it can never start, or an empty string."""
        failures = 0
        while True:
            record = self._context.records.by_id(job)
            if record.stop_wish is not None:
                return ""
            if self._context.node_lost(record):
                return "its node left the cluster before it started"
            try:
                await self._launch_once(record)
            except ConflictError as error:
                return error.message
            except (ClusterError, StorageError, NotFoundError) as error:
                self._context.set_message(record, _waiting_reason(error), error.message)
            except RaylaunchError as error:
                failures += 1
                if failures >= _MAX_FAILURES:
                    return error.message
                self._context.set_message(record, Reason.SENDING_CODE, error.message)
            else:
                return ""
            await self._context.observed.wait(STEP_S)

    async def _launch_once(self, record: JobRecord) -> None:
        attempt = latest(record)
        wanted = record.own_spec
        names = {*self._context.settings.secrets, *wanted.secrets, WANDB_KEY}
        secrets = self._context.secrets.for_job(record.id, names, record.owner)
        missing = sorted(set(wanted.secrets) - set(secrets))
        if missing:
            msg = f"the secret {missing[0]} is no longer set, or not available to {record.owner}"
            raise ConflictError(msg)
        settings = self._context.settings
        spec = attempt_spec(
            wanted,
            job=record.id,
            n=attempt.n,
            epoch=record.epoch,
            settings=settings,
            links=record.pack.links if record.pack else (),
            earlier=await asyncio.to_thread(earlier_runs, settings.store / "jobs" / record.id, attempt.n),
        )
        prepared = await self._context.bridge.prepare(
            attempt.node_id, spec=spec, package=record.package, secrets=secrets, wheels=record.wheels
        )
        await self._context.ray.submit(_submission(record, attempt, prepared))
        self._context.records.update(record.id, kind="", submitted_to_ray=True)


def _waiting_reason(error: RaylaunchError) -> Reason:
    return Reason.DISK_FULL if isinstance(error, StorageError) else Reason.WAITING_FOR_RAY


def _submission(record: JobRecord, attempt: AttemptView, prepared: ReadyAttempt) -> Submission:
    amounts = (
        {} if record.own_spec.launcher == "ray" else required_amounts(record.own_spec)
    )  # its workers request theirs themselves
    return Submission(
        id=attempt.id,
        entrypoint=prepared.command,
        node_id=attempt.node_id,
        gpus=amounts.pop(GPUS, 0),
        cpus=amounts.pop(CPUS, 0),
        memory=int(amounts.pop(MEMORY, 0)),
        custom=amounts,
        env_vars={"RAY_JOB_STOP_WAIT_TIME_S": str(int(record.own_spec.grace_s + 10))},
        metadata={"raylaunch_job": record.id, "name": record.name, "owner": record.owner},
    )
