"""Bring an embedded cluster up, step by step: only what does not run is started. The caller holds the lock."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio

from raylaunch.cluster import assign, tls
from raylaunch.cluster.controller_program import controller_status, not_ready
from raylaunch.cluster.controller_start import ControllerStart
from raylaunch.cluster.gpus import GpuChoice, choose_gpus, detect_gpus
from raylaunch.cluster.home import ClusterPaths, make_store, secret_file, storage_errors
from raylaunch.cluster.look import Seen, differences, look
from raylaunch.cluster.neighbours import check_gpus, neighbours
from raylaunch.cluster.plan import Step
from raylaunch.cluster.ports import ANYWHERE, LOOPBACK, own_addresses
from raylaunch.cluster.process import end, is_alive
from raylaunch.cluster.ray_head import RayStart, installed_ray, jobs_answer, make_importable, nodes_alive
from raylaunch.cluster.record import (
    ClusterRecord,
    NodePlace,
    Versions,
    keep_unreadable_aside,
    new_record,
    recalled_cluster_id,
    save_record,
    store_of,
)
from raylaunch.cluster.steps import DiedError, Steps
from raylaunch.cluster.sweep import of_controller, sweep_ray
from raylaunch.cluster.versions import check_versions
from raylaunch.spec import ClusterSpec
from raylaunch.version import __version__

JOBS_S, NODE_S, STEWARD_S = 180.0, 120.0, 180.0


class BringUp:
    """One `up`: what it knows, and its steps."""

    def __init__(
        self,
        paths: ClusterPaths,
        spec: ClusterSpec,
        on_step: Callable[[Step], None],
        environ: Mapping[str, str] = os.environ,
        *,
        place: NodePlace | None = None,
    ) -> None:
        self.paths = paths
        self.asked = spec
        self.on_step = on_step
        self.environ = environ
        self.place = place
        self.record = new_record(spec, paths)
        self.steps = Steps(paths, on_step)

    async def run(self, *, ray_only: bool = False) -> Seen:
        """Bring it up and return what is seen then. With `ray_only` the controller is not waited for.

        Raises:
            ClusterStartError: a step failed; what was started here is ended again.
            ConflictError: a fixed port or a GPU is somebody else's.
            VersionError: Ray or the running cluster does not fit.
        """
        seen = await look(self.paths)
        ray_version = installed_ray()
        upgrade = check_versions(seen, ray_version)
        if not seen.problems and not upgrade:
            self._tell_kept(seen)
            return seen
        self._take_record(seen, ray_version, upgrade=upgrade)
        self._check_fixed_port()
        try:
            await self._start_missing(ray_only=ray_only, upgrade=upgrade)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.steps.undo(self.record)
            raise
        return await look(self.paths)

    async def _start_missing(self, *, ray_only: bool, upgrade: bool) -> None:
        """Start what does not run. What ends while it is waited for is started once more."""
        try:
            await self._start_all(ray_only=ray_only, upgrade=upgrade)
        except DiedError as error:
            self.steps.note(error.step, "it ended while it was waited for; it is started again")
            await self._start_all(ray_only=ray_only, upgrade=False)

    async def _start_all(self, *, ray_only: bool, upgrade: bool) -> None:
        await self._ray()
        await self._controller(wait=not ray_only, upgrade=upgrade)
        await self.steps.step("node", "waits until Ray lists this machine", self._node, NODE_S)
        if not ray_only:
            await self.steps.step("steward", "waits for the node's steward", self._steward, STEWARD_S)

    def _tell_kept(self, seen: Seen) -> None:
        if seen.record is None or seen.record.ray is None or seen.record.controller is None:
            return
        self.on_step(Step("ray", "kept", f"Ray runs (pid {seen.record.ray.pid})"))
        self.on_step(Step("controller", "kept", f"the controller runs (pid {seen.record.controller.pid})"))
        for difference in differences(self.asked, seen.record):
            self.steps.note("spec", difference)

    def _take_record(self, seen: Seen, ray_version: str, *, upgrade: bool) -> None:
        """Go on from the record. The spec that runs counts while anything of the cluster runs.

        An older controller that is to be replaced stands in it until it has ended: an `up` may be killed before.
        """
        if aside := keep_unreadable_aside(self.paths):
            self.steps.note("record", f"the cluster's record could not be understood; it is kept as {aside.name}")
        had = seen.record or new_record(self.asked, self.paths, cluster_id=recalled_cluster_id(self.paths))
        if seen.ray_alive or seen.controller_alive:
            for difference in differences(self.asked, had):
                self.steps.note("spec", difference)
        else:
            had = had.with_(spec=self.asked, store=store_of(self.asked, self.paths), place=self.place or had.place)
        if had.wanted == "stopped":  # no Ray of the cluster runs on any host
            had = had.with_(tls=self.asked.uses_tls)
        self._set_gcs_aside(had.versions.ray, ray_version)
        ours = had.versions.raylaunch if upgrade else __version__
        versions = Versions(raylaunch=ours, ray=ray_version, python=platform.python_version())
        make_store(Path(had.store))
        make_importable(self.paths)
        self.token = secret_file(self.paths.token)
        self.ray_token = secret_file(self.paths.ray_token)
        self._save(had.with_(wanted="running", versions=versions))

    def _check_fixed_port(self) -> None:
        """Say that the controller's port is taken before Ray is started for nothing."""
        fixed = self.record.spec.port
        if fixed is not None and not of_controller(self.record.cluster_id):
            assign.controller_port({}, fixed=fixed, say=lambda _: None, avoid=())

    def _set_gcs_aside(self, had: str, has: str) -> None:
        if had and had != has and any(self.paths.gcs.iterdir()):
            aside = self.paths.gcs.with_name(f"gcs-of-ray-{had}-{time.time():.0f}")
            with storage_errors(self.paths.gcs):
                self.paths.gcs.rename(aside)
                self.paths.gcs.mkdir(mode=0o700)
            self.steps.note("ray", f"Ray {has} does not read what Ray {had} stored; that is kept as {aside.name}")

    def _save(self, record: ClusterRecord) -> None:
        self.record = save_record(self.paths, record)

    # Ray

    async def _ray(self) -> None:
        if is_alive(self.record.ray):
            try:
                await self._wait_for_ray()
            except DiedError:
                self.steps.note("ray", "Ray ended while it was waited for; it is started again")
            else:
                return
        await self._start_ray()
        await self._wait_for_ray()

    async def _start_ray(self) -> None:
        if self.record.ray is not None:
            self.steps.note("ray", f"Ray (pid {self.record.ray.pid}) is gone; it is started again")
        left = await sweep_ray(self.record.cluster_id, self.record.ray, self.paths.temp)
        if left:
            self.steps.note("ray", f"ended {len(left)} processes that it had left behind")
        gpus = await self._gpus()
        ports = assign.ray_ports(
            self.record.ports,
            say=lambda words: self.steps.note("ports", words),
            avoid=self._promised(),
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
        argv = head.argv()
        self.on_step(Step("ray", "begins", f"starts Ray {self.record.versions.ray} with {gpus}"))
        ray = await self.steps.start(argv, head.environment(self.environ), self.paths.ray_log)
        self._save(self.record.with_(ray=ray))
        if moved and self.record.controller is not None:  # it knows Ray's old address
            await end([self.record.controller], grace_s=10)

    def _promised(self) -> tuple[int, ...]:
        fixed = self.record.spec.port
        return tuple(port for port in (fixed, self.record.ports.get("controller")) if port)

    async def _gpus(self) -> GpuChoice:
        spec = self.record.spec
        choice = choose_gpus(spec, [] if isinstance(spec.gpus, int) else await detect_gpus(), self.environ)
        if choice.gpus:
            check_gpus(spec, choice, neighbours(self.paths.controller_config))
        return choice

    async def _wait_for_ray(self) -> None:
        await self.steps.step("jobs", "waits for Ray's Jobs endpoint", self._jobs, JOBS_S)

    async def _jobs(self) -> str:
        self.steps.must_live("ray", "Ray", self.record.ray, self.paths.ray_log)
        return await jobs_answer(self.record.ports, self.ray_token)

    async def _node(self) -> str:
        self.steps.must_live("ray", "Ray", self.record.ray, self.paths.ray_log)
        return "" if await nodes_alive(self.record.ports, self.ray_token) else "Ray lists no living node"

    # The controller

    async def _controller(self, *, wait: bool, upgrade: bool) -> None:
        start = ControllerStart(self.paths, self.steps, self.record, token=self.token, environ=self.environ)
        try:
            await start.run(wait=wait, upgrade=upgrade)
        finally:
            self.record = start.record

    async def _steward(self) -> str:
        self.steps.must_live("ray", "Ray", self.record.ray, self.paths.ray_log)
        self.steps.must_live("controller", "the controller", self.record.controller, self.paths.controller_log)
        return not_ready(await controller_status(self.record.ports["controller"], self.token))
