"""This machine's part of a cluster, started step by step: the head (`BringUp`), or Ray joining one (`WorkerJoin`).

Only what does not run is started. The caller holds the cluster's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio

from raylaunch.cluster import tls
from raylaunch.cluster.local.controller_process import ControllerStart, controller_status, not_ready
from raylaunch.cluster.local.gpus import gpus_for
from raylaunch.cluster.local.inspect import LocalInspection, check_versions, differences, inspect_cluster
from raylaunch.cluster.local.ray_head import RayStart, installed_ray, jobs_answer, make_importable, nodes_alive
from raylaunch.cluster.local.steps import DiedError, StepLog
from raylaunch.cluster.ports import ANYWHERE, LOOPBACK, controller_port, own_addresses, ray_ports
from raylaunch.cluster.processes import (
    ProcessIdentity,
    end,
    is_alive,
    kill,
    last_lines,
    node_agents,
    of_controller,
    sweep_ray,
)
from raylaunch.cluster.record import (
    ClusterRecord,
    NodePlace,
    current_versions,
    keep_unreadable_aside,
    load_record,
    new_record,
    save_record,
    store_of,
)
from raylaunch.cluster.tls import NodeCertificate
from raylaunch.cluster.types import Step
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths, make_store, secret_file, storage_errors, write_private
from raylaunch.version import __version__

JOBS_S, NODE_S, AGENT_S = 180.0, 120.0, 180.0
JOIN_S = 120.0
_GRACE_S = 15.0
_JOINED = "Ray runtime started."
"""What ``ray start`` prints once its raylet is registered with the head."""


class BringUp:
    """One `up`: its state and its steps."""

    def __init__(
        self,
        paths: ClusterPaths,
        spec: ClusterSpec,
        on_step: Callable[[Step], None],
        *,
        place: NodePlace | None = None,
    ) -> None:
        self.paths = paths
        self.requested = spec
        self.on_step = on_step
        self.place = place
        self.record = new_record(spec, paths)
        self.steps = StepLog(paths, on_step)

    async def run(self, *, ray_only: bool = False) -> LocalInspection:
        """Bring it up and return an inspection of it. With `ray_only` the controller is not waited for.

        Raises:
            ClusterStartError: a step failed; everything that was started here has been ended.
            ConflictError: a fixed port or a GPU is in use by somebody else.
            VersionError: Ray or the running cluster is incompatible.
        """
        seen = await inspect_cluster(self.paths)
        ray_version = installed_ray()
        upgrade = check_versions(seen, ray_version)
        if not seen.problems and not upgrade:
            self._report_kept(seen)
            return seen
        self._prepare_record(seen, ray_version, upgrade=upgrade)
        self._check_fixed_port()
        try:
            await self._start_missing(ray_only=ray_only, upgrade=upgrade)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.steps.undo(self.record)
            raise
        return await inspect_cluster(self.paths)

    async def _start_missing(self, *, ray_only: bool, upgrade: bool) -> None:
        """Start what does not run. A process that exits meanwhile is restarted once."""
        try:
            await self._start_all(ray_only=ray_only, upgrade=upgrade)
        except DiedError as error:
            self.steps.note(error.step, "it exited during start; restarting it")
            await self._start_all(ray_only=ray_only, upgrade=False)

    async def _start_all(self, *, ray_only: bool, upgrade: bool) -> None:
        await self._ray()
        await self._controller(wait=not ray_only, upgrade=upgrade)
        await self.steps.step("node", "waiting for Ray to list this node", "Ray lists this node", self._node, NODE_S)
        if not ray_only:
            await self.steps.step("agent", "waiting for the node agent", "node agent ready", self._agent, AGENT_S)

    def _report_kept(self, seen: LocalInspection) -> None:
        if seen.record is None or seen.record.ray is None or seen.record.controller is None:
            return
        self.on_step(Step("ray", "kept", f"Ray is running (pid {seen.record.ray.pid})"))
        self.on_step(Step("controller", "kept", f"the controller is running (pid {seen.record.controller.pid})"))
        for difference in differences(self.requested, seen.record):
            self.steps.note("spec", difference)

    def _prepare_record(self, seen: LocalInspection, ray_version: str, *, upgrade: bool) -> None:
        """Continue from the record. While any part of the cluster runs, the spec that it was started with applies.

        An older controller stays in the record until it has exited: an `up` may be killed before that.
        """
        if aside := keep_unreadable_aside(self.paths):
            self.steps.note("record", f"cannot read the cluster's record; it was renamed to {aside.name}")
        had = seen.record or new_record(self.requested, self.paths)
        if seen.ray_alive or seen.controller_alive:
            for difference in differences(self.requested, had):
                self.steps.note("spec", difference)
        else:
            had = had.with_(
                spec=self.requested, store=store_of(self.requested, self.paths), place=self.place or had.place
            )
        if had.wanted == "stopped":  # no Ray of the cluster runs on any host
            had = had.with_(tls=self.requested.uses_tls)
        self._set_gcs_aside(had.versions.ray, ray_version)
        ours = had.versions.raylaunch if upgrade else __version__
        versions = current_versions(ray_version).model_copy(update={"raylaunch": ours})
        make_store(Path(had.store))
        make_importable(self.paths)
        self.token = secret_file(self.paths.token)
        self.ray_token = secret_file(self.paths.ray_token)
        self._save(had.with_(wanted="running", versions=versions))

    def _check_fixed_port(self) -> None:
        """Fail early, before Ray is started, if the controller's port is taken."""
        fixed = self.record.spec.port
        if fixed is not None and not of_controller(self.record.cluster_id):
            controller_port({}, fixed=fixed, on_taken=lambda _: None, avoid=())

    def _set_gcs_aside(self, had: str, has: str) -> None:
        if had and had != has and any(self.paths.gcs.iterdir()):
            aside = self.paths.gcs.with_name(f"gcs-of-ray-{had}-{time.time():.0f}")
            with storage_errors(self.paths.gcs):
                self.paths.gcs.rename(aside)
                self.paths.gcs.mkdir(mode=0o700)
            self.steps.note("ray", f"Ray {has} cannot read the state of Ray {had}, which was renamed to {aside.name}")

    def _save(self, record: ClusterRecord) -> None:
        self.record = save_record(self.paths, record)

    # Ray

    async def _ray(self) -> None:
        if is_alive(self.record.ray):
            try:
                await self._wait_for_jobs_api()
            except DiedError:
                self.steps.note("ray", "Ray exited during start; restarting it")
            else:
                return
        await self._start_ray()
        await self._wait_for_jobs_api()

    async def _start_ray(self) -> None:
        if self.record.ray is not None:
            self.steps.note("ray", f"Ray (pid {self.record.ray.pid}) exited; restarting it")
        left = await sweep_ray(self.record.cluster_id, self.record.ray, self.paths.temp)
        if left:
            self.steps.note("ray", f"ended {len(left)} leftover processes")
        gpus = await gpus_for(self.record.spec, self.paths.controller_config)
        ports = ray_ports(
            self.record.ports,
            on_taken=partial(self.steps.note, "ports"),
            avoid=tuple(port for port in (self.record.spec.port, self.record.ports.get("controller")) if port),
            address=ANYWHERE if self.record.place.address else LOOPBACK,
        )
        moved = any(self.record.ports.get(key) not in (None, ports[key]) for key in ("gcs", "dashboard"))
        self._save(self.record.with_(ports=self.record.ports | ports, gpu_uuids=gpus.uuids, ray=None))
        head = RayStart(
            self.paths, self.record.spec, self.record.cluster_id, ports, gpus, self.record.place, tls=self.record.tls
        )
        if self.record.tls:
            certificate = tls.issue(self.paths, self.record.place.host or "head", own_addresses())
            self._save(self.record.with_(tls_until=tls.keep(self.paths, certificate)))
        self.steps.started("ray", f"starting Ray {self.record.versions.ray} with {gpus}")
        ray = await self.steps.start(head.argv(), head.environment(), self.paths.ray_log)
        self._save(self.record.with_(ray=ray))
        if moved and self.record.controller is not None:  # it uses Ray's old address
            await end([self.record.controller], grace_s=10)

    async def _wait_for_jobs_api(self) -> None:
        await self.steps.step("jobs", "waiting for Ray's Jobs API", "Ray's Jobs API is ready", self._jobs, JOBS_S)

    async def _jobs(self) -> str:
        self.steps.must_live("ray", "Ray", self.record.ray, self.paths.ray_log)
        return await jobs_answer(self.record.ports, self.ray_token)

    async def _node(self) -> str:
        self.steps.must_live("ray", "Ray", self.record.ray, self.paths.ray_log)
        return "" if await nodes_alive(self.record.ports, self.ray_token) else "Ray lists no live node"

    # The controller

    async def _controller(self, *, wait: bool, upgrade: bool) -> None:
        start = ControllerStart(self.paths, self.steps, self.record, token=self.token)
        try:
            await start.run(wait=wait, upgrade=upgrade)
        finally:
            self.record = start.record

    async def _agent(self) -> str:
        self.steps.must_live("ray", "Ray", self.record.ray, self.paths.ray_log)
        self.steps.must_live("controller", "the controller", self.record.controller, self.paths.controller_log)
        return not_ready(await controller_status(self.record.ports["controller"], self.token))


@dataclass
class WorkerJoin:
    """One worker that joins a head. The caller holds the cluster's lock."""

    paths: ClusterPaths
    spec: ClusterSpec
    """This machine's part of the cluster."""
    on_step: Callable[[Step], None]
    place: NodePlace
    """Which machine this is, and where the head is."""
    cluster_id: str
    """The head's."""
    ray_token: str = field(default="", repr=False)
    """The head's, which its port requires."""
    certificate: NodeCertificate | None = None
    """This node's, if the cluster uses TLS. Without it and `ray_token`, the previous ones are used."""

    def __post_init__(self) -> None:
        self.steps = StepLog(self.paths, self.on_step)

    async def run(self) -> ClusterRecord:
        """Join, and return this machine's record.

        Raises:
            ClusterStartError: Ray did not join; everything that was started has been ended.
            ConflictError: a GPU belongs to another cluster.
            SpecError: a GPU that the spec lists does not exist.
            VersionError: Ray is incompatible, or another one runs here.
        """
        version = installed_ray()
        had = load_record(self.paths)
        if had is not None and is_alive(had.ray):
            check_versions(LocalInspection(had, ray_alive=True), version)
            if had.place == self.place and had.cluster_id == self.cluster_id and self._has_certificate(had):
                return await self._keep(had)
            self.steps.note("ray", f"the head moved from {had.place.head or 'here'} to {self.place.head}; Ray joins it")
        record = had or new_record(self.spec, self.paths, cluster_id=self.cluster_id)
        make_importable(self.paths)
        if record.ray is not None:
            await end([record.ray], grace_s=_GRACE_S)
        await sweep_ray(record.cluster_id, record.ray, self.paths.temp)
        record = record.with_(
            spec=self.spec,
            cluster_id=self.cluster_id,
            place=self.place,
            wanted="running",
            versions=current_versions(version),
            ray=None,
            controller=None,
        )
        if self.ray_token:
            write_private(self.paths.ray_token, self.ray_token)
            until = tls.keep(self.paths, self.certificate) if self.certificate else None
            record = record.with_(tls=self.certificate is not None, tls_until=until)
        try:
            return await self._start(save_record(self.paths, record))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.steps.undo(load_record(self.paths) or record)
            raise

    def _has_certificate(self, record: ClusterRecord) -> bool:
        """Return whether this machine's Ray uses TLS in the way that the head's does now."""
        if not self.ray_token:  # nothing new was sent
            return True
        if self.certificate is None:
            return not record.tls
        return record.tls and tls.has_authority(self.paths, self.certificate)

    async def _keep(self, record: ClusterRecord) -> ClusterRecord:
        """Leave Ray running. A node agent of another raylaunch is ended: Ray restarts it from this one.

        A new controller has restarted it already, but before this machine had the new code.
        """
        pid = record.ray.pid if record.ray else 0
        self.on_step(Step("ray", "kept", f"Ray is running (pid {pid})"))
        for difference in differences(self.spec, record):
            self.steps.note("spec", difference)
        if make_importable(self.paths) or record.versions.raylaunch != __version__:
            await kill(node_agents(record.ray))  # after SIGTERM, Ray would not restart it
            self.steps.note("agent", f"restarted with raylaunch {__version__}; jobs continue")
        versions = record.versions.model_copy(update={"raylaunch": __version__})
        return record if versions == record.versions else save_record(self.paths, record.with_(versions=versions))

    async def _start(self, record: ClusterRecord) -> ClusterRecord:
        gpus = await gpus_for(self.spec, self.paths.controller_config)
        ports = ray_ports(record.ports, on_taken=partial(self.steps.note, "ports"), avoid=(), address=ANYWHERE)
        record = save_record(self.paths, record.with_(ports=ports, gpu_uuids=gpus.uuids))
        ray = RayStart(self.paths, self.spec, self.cluster_id, ports, gpus, self.place, tls=record.tls)
        self.steps.started("ray", f"starting Ray {record.versions.ray} with {gpus}, joining {self.place.head}")
        for tries_left in (2, 1, 0):
            process = await self.steps.start(ray.argv(), ray.environment(), self.paths.ray_log)
            record = save_record(self.paths, record.with_(ray=process))
            try:
                await self._joined(process)
            except DiedError:
                if not tries_left:
                    raise
                self.steps.note("ray", "it gave up after 30 s, as it does on a busy machine; restarting it")
                await sweep_ray(self.cluster_id, process, self.paths.temp)
            else:
                break
        return record

    async def _joined(self, process: ProcessIdentity) -> None:
        async def joined() -> str:
            self.steps.must_live("ray", "Ray", process, self.paths.ray_log)
            since = last_lines(self.paths.ray_log, count=200).rpartition("\n--- ")[2]
            return "" if _JOINED in since else "it has not registered yet"

        await self.steps.step("join", f"joining {self.place.head}", f"joined {self.place.head}", joined, JOIN_S)
