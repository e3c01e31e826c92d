"""Requests about jobs: submit, dry run, stop, remove, fetch outputs that were not kept; and the controller's status."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import time
from collections.abc import Sequence

from raylaunch.contract import OUTPUTS, WITHHELD, StopWish
from raylaunch.controller.ray.bridge import RayBridge
from raylaunch.controller.ray.calls import by_name
from raylaunch.controller.scheduler.attempt_context import wandb_link
from raylaunch.controller.scheduler.external_jobs import ExternalJobs
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.scheduler.preflight import WheelPreflight
from raylaunch.controller.scheduler.queue import (
    Admit,
    active_allocations,
    node_capacities,
    plan_queue,
    unsatisfiable_reason,
    with_drains,
)
from raylaunch.controller.settings import Settings
from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.audit import DrainStore
from raylaunch.controller.store.backlog import request_for
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.packages import PackageStore
from raylaunch.controller.store.record import JobRecord
from raylaunch.controller.store.retention import JobRemoval
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.errors import ConflictError, NotFoundError, SpecError, UnsatisfiableError
from raylaunch.models.cluster import ControllerStatus, EnvironmentWheels, RayAccess
from raylaunch.models.job import DryRun, JobView, NodeUsage, SubmitAnswer, SubmitRequest, WheelSet
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import Change, JobState, Reason
from raylaunch.version import API, __version__

_FRESH_S = 2.0
"""Maximum age of the node data in a response: their GPUs and disks have other users too."""
_REFRESH_S = 3.0
"""How long a response waits for newer node data; then it has the latest there is."""
_DISK_S = 60.0
"""How long a node may take to measure its folders."""


class LeftOutputs:
    """Copies outputs that were not kept from their node into the store, each once even for concurrent requests."""

    def __init__(self, *, bridge: RayBridge, observed: ObservedState, artifacts: Artifacts) -> None:
        self._bridge = bridge
        self._observed = observed
        self._artifacts = artifacts
        self._transfers: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def bring(self, record: JobRecord, name: str) -> None:
        """Copy a file into the store, if it is not there.

        Args:
            record: the job.
            name: one of `raylaunch.controller.store.artifacts.Left.sizes`.

        Raises:
            NotFoundError: its node has left the cluster, or no longer has the file.
            ClusterError: its node does not respond.
        """
        left = await asyncio.to_thread(self._artifacts.left, record.id)
        below = WITHHELD if name in left.withheld else OUTPUTS
        key = (f"{record.id}-{left.n}", name)
        if key not in self._transfers:
            self._transfers[key] = asyncio.create_task(self._bring(record, left.n, name, below))
            self._transfers[key].add_done_callback(functools.partial(self._transfer_done, key))
        await asyncio.shield(self._transfers[key])

    async def _bring(self, record: JobRecord, n: int, name: str, below: str) -> None:
        attempt = next((attempt for attempt in record.attempts if attempt.n == n), None)
        node_id = self._observed.node_of(attempt) if attempt is not None else ""
        if attempt is None or not node_id:
            msg = f"{name} was not kept, and {attempt.node if attempt else 'its node'} is not in the cluster"
            raise NotFoundError(msg, hint="it can be fetched within 7 days, once the node is back")
        await self._bridge.bring_left(node_id, attempt.id, name, below=below)
        await asyncio.to_thread(self._artifacts.finalize, record.id)

    def _transfer_done(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        self._transfers.pop(key, None)
        if not task.cancelled():
            task.exception()  # every waiter has raised it


class JobService:
    """Operations on jobs. Each returns quickly; the scheduler's loop continues from the record."""

    def __init__(  # noqa: PLR0913 -- the parts that it uses, all named
        self,
        *,
        settings: Settings,
        records: Records,
        packages: PackageStore,
        secrets: SecretStore,
        removal: JobRemoval,
        observed: ObservedState,
        bridge: RayBridge,
        drains: DrainStore,
        foreign: ExternalJobs,
        wheel_needs: WheelPreflight,
        left: LeftOutputs,
    ) -> None:
        self._settings = settings
        self._records = records
        self._packages = packages
        self._secrets = secrets
        self._removal = removal
        self._observed = observed
        self._bridge = bridge
        self._drains = drains
        self._foreign = foreign
        self._wheel_needs = wheel_needs
        self._left = left
        self._started_at = time.time()

    async def submit(self, request: SubmitRequest, person: str) -> SubmitAnswer:
        """Accept a job. Once this returns, nothing is lost.

        Raises:
            SpecError: a secret that it names is not set, or one that came with it is invalid.
            UnsatisfiableError: no node can ever run it.
            WheelsNeededError: as `raylaunch.controller.scheduler.preflight.WheelPreflight.check`.
            ConflictError: its code has not arrived, or the request id belongs to another job.
            StorageError: the store's disk is full.
        """
        self._check(request, person)
        await self._wheel_needs.check(request)
        request = self._wheel_needs.complete(request)
        record, created = self._records.create(
            request,
            owner=person,
            wandb=lambda job: wandb_link(request.spec, job=job, cluster_id=self._settings.cluster_id),
            prepare=lambda job: self._secrets.put_job(job, request.secrets),
        )
        self._observed.notify()
        return SubmitAnswer(job=record.view(), created=created)

    async def dry_run(self, request: SubmitRequest, person: str) -> DryRun:
        """Return where the job could run now, or what it would wait for.

        Raises:
            SpecError: as `submit`.
            UnsatisfiableError: as `submit`.
        """
        self._check(request, person, package=False)
        wheels_for = await self._wheel_needs.of(request.spec)
        await self._observed.fresh_nodes(age_s=_FRESH_S, timeout_s=_REFRESH_S)
        rooms = node_capacities(with_drains(self._observed.nodes, self._drains.now()))
        ask = request_for(request.spec, job="(this job)", since=time.time())
        holdings = active_allocations(
            self._records.active(), released=self._observed.released, seen=self._observed.attempts
        )
        backlog = self._records.backlog
        with backlog.joined_by(ask):
            decision = plan_queue(backlog, rooms, holdings, groups=backlog.groups, down=self._observed.down).of(ask)
        message = f"would start on {decision.hostname} immediately" if isinstance(decision, Admit) else decision.message
        if wheels_for:
            platforms = ", ".join(map(str, wheels_for))
            message += f"; nodes with {platforms} cannot reach a package index, so wheels would be sent along"
        fits = (decision.hostname,) if isinstance(decision, Admit) else ()
        environment = self._settings.environment_of(request.spec)
        there = self._wheel_needs.there(request.spec)
        return DryRun(fits=fits, message=message, wheels_for=wheels_for, wheels_there=there, environment=environment)

    async def keep_wheels(self, given: EnvironmentWheels) -> None:
        """Store the list of wheels of the cluster's own environment, which have been uploaded.

        Raises:
            ConflictError: one has not been uploaded, or they are for another environment.
        """
        self._check_wheels(given.sets)
        await self._wheel_needs.kept.keep(given)

    async def stop(self, record: JobRecord, *, grace_s: float | None, person: str) -> JobView:
        """Request the stop of a job; it is ``stopped`` once all its processes have exited.

        Raises:
            ConflictError: it has ended already.
        """
        if record.foreign:
            return self._foreign.stop(record, grace_s=grace_s, person=person)
        if record.state.ended:
            msg = f"{record.id} has ended already: {record.state.value}"
            raise ConflictError(msg, hint=f"raylaunch show {record.id}")
        message = f"stop requested by {person}"
        if not record.state.active:
            self._records.update(
                record.id,
                kind="ended",
                message=f"cancelled by {person} before it started",
                change=Change.END_STOPPED,
                reason=Reason.STOP_REQUESTED,
                ended_at=time.time(),
            )
            self._secrets.forget_job(record.id)
            return self._records.by_id(record.id).view()
        spec_grace = record.spec.grace_s if record.spec is not None else 30.0
        wish = StopWish(why="stopped", grace_s=spec_grace if grace_s is None else grace_s)
        change = None if record.state is JobState.STOPPING else Change.STOP
        self._records.update(
            record.id,
            kind="stopping",
            message=message,
            change=change,
            reason=Reason.STOP_REQUESTED,
            stop_wish=wish,
            again=False,
        )
        self._observed.notify()
        return self._records.by_id(record.id).view()

    async def remove(self, record: JobRecord) -> int:
        """Delete an ended job, its record and all its files; return the bytes that they took.

        Raises:
            ConflictError: it has not ended.
            ClusterDownError: it is an external job, which Ray must delete too, and Ray does not respond.
        """
        if record.foreign:
            await self._foreign.remove(record)
            return 0
        return await self._removal.remove(record.id)

    async def status(self, person: str, role: str) -> ControllerStatus:
        """Return the state of the controller, Ray and the nodes."""
        observed = self._observed
        await observed.fresh_nodes(age_s=_FRESH_S, timeout_s=_REFRESH_S)
        return ControllerStatus(
            cluster=self._settings.cluster,
            version=__version__,
            api=API,
            pid=os.getpid(),
            person=person,
            role=role,
            started_at=self._started_at,
            ray="up" if observed.bridge_up and observed.ray_answers else "down",
            ray_version=observed.ray_version,
            nodes=by_name(with_drains(observed.nodes, self._drains.now())),
            queued=len(self._records.backlog),
            running=len(self._records.active()),
            store=str(self._settings.store),
            store_free=shutil.disk_usage(self._settings.store).free,
            problems=self._problems(),
        )

    def explained(self, view: JobView) -> JobView:
        """Return a queued job with its current wait reason, and any other job unchanged."""
        ask, plan = self._records.backlog.get(view.id), self._observed.plan
        block = plan.block(ask) if ask is not None and plan is not None else None
        return view if block is None else view.model_copy(update={"reason": block.reason, "message": block.message})

    async def wait_growth(self, attempt_id: str, timeout_s: float) -> None:
        """Return when a file of the attempt has grown, or at the timeout."""
        await self._observed.wait_growth(attempt_id, timeout_s)

    async def bring_left(self, record: JobRecord, name: str) -> None:
        """Copy an output that was not kept from its node."""
        await self._left.bring(record, name)

    async def node_usage(self) -> tuple[NodeUsage, ...]:
        """Return raylaunch's disk usage on each node; one that does not respond is left out."""
        nodes = [node for node in self._observed.nodes if node.alive and node.ready]
        asked = (self._bridge.call_agent(node.id, "disk_use", timeout_s=_DISK_S) for node in nodes)
        found = await asyncio.gather(*asked, return_exceptions=True)
        return tuple(
            NodeUsage.model_validate({"host": node.hostname, **use})
            for node, use in zip(nodes, found, strict=True)
            if isinstance(use, dict)
        )

    def ray_access(self) -> RayAccess:
        """Return what Ray's own tools need to reach the cluster."""
        settings = self._settings
        return RayAccess(
            gcs_address=settings.gcs_address,
            dashboard_url=settings.dashboard_url,
            token=settings.ray_token,
            tls=settings.ray_env,
        )

    def _problems(self) -> tuple[str, ...]:
        observed = self._observed
        found = list(self._records.repairs)
        if not observed.bridge_up:
            found.append(f"Ray cannot be reached: {observed.bridge_error or 'connecting'}")
        silent = [node for node in observed.nodes if node.alive and not node.ready]
        found += [f"the node agent on {node.hostname} does not respond" for node in silent]
        found += [f"{attempt}: {message}" for attempt, message in observed.store_problems.items()]
        found += [one for one in (observed.storage_error, self._drains.problem) if one]
        return tuple(found)

    def _check(self, request: SubmitRequest, person: str, *, package: bool = True) -> None:
        self._secrets.check(request.secrets)
        missing = self._secrets.missing((*self._settings.secrets, *request.spec.secrets), given=request.secrets)
        if missing:
            msg = f"the secret {missing[0]} is not set on cluster {self._settings.cluster}"
            raise SpecError(msg, hint=f"raylaunch secret set {missing[0]}", field="secrets")
        if withheld := self._secrets.withheld(set(request.spec.secrets) - request.secrets.keys(), person):
            msg = f"the secret {withheld[0]} is not available to {person}"
            hint = f"ask an operator: raylaunch secret set {withheld[0]} --for {person}; or send your own value"
            raise SpecError(msg, hint=hint, field="secrets")
        self._check_fits(request.spec)
        if package and request.package and not self._packages.have(request.package).complete:
            msg = f"the code of this job (package {request.package[:12]}) has not arrived"
            raise ConflictError(msg, hint="submit it again; what has arrived is not sent again")
        self._check_wheels(request.wheels)

    def _check_wheels(self, sets: Sequence[WheelSet]) -> None:
        for wheel in (one for found in sets for one in found.wheels):
            if not self._packages.have(wheel.sha256).complete:
                msg = f"the wheel {wheel.file} has not arrived"
                raise ConflictError(msg, hint="submit it again; what has arrived is not sent again")

    def _check_fits(self, spec: JobSpec) -> None:
        rooms = node_capacities(self._observed.nodes)
        never = unsatisfiable_reason(request_for(spec), rooms) if rooms else ""
        if never:
            msg = f"{spec.display_name} can never run on cluster {self._settings.cluster}: {never}"
            raise UnsatisfiableError(msg, hint="request less, or see the nodes: raylaunch status")
