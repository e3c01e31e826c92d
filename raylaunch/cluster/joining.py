"""Bring this machine into the Ray of a head elsewhere: only what does not run is started."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping

import anyio

from raylaunch.cluster import assign, tls
from raylaunch.cluster.gpus import choose_gpus, detect_gpus
from raylaunch.cluster.home import ClusterPaths, write_private
from raylaunch.cluster.look import Seen, differences
from raylaunch.cluster.neighbours import check_gpus, neighbours
from raylaunch.cluster.plan import Step
from raylaunch.cluster.ports import ANYWHERE
from raylaunch.cluster.process import ProcessIdentity, end, is_alive, kill, last_lines
from raylaunch.cluster.ray_head import RayStart, installed_ray, make_importable
from raylaunch.cluster.record import ClusterRecord, NodePlace, Versions, load_record, new_record, save_record
from raylaunch.cluster.steps import DiedError, Steps
from raylaunch.cluster.sweep import stewards, sweep_ray
from raylaunch.cluster.tls import NodeCertificate
from raylaunch.cluster.versions import check_versions
from raylaunch.spec import ClusterSpec
from raylaunch.version import __version__

JOIN_S = 120.0
_GRACE_S = 15.0
_JOINED = "Ray runtime started."
"""What ``ray start`` prints once its raylet is registered with the head."""


class Joining:
    """One joining of a head: what it knows, and its steps. The caller holds the cluster's lock.

    Args:
        paths: of the cluster on this machine.
        spec: this machine's part of it.
        place: which machine this is, and where the head is.
        cluster_id: the head's.
        ray_token: the head's, for its port is closed to those who do not have it.
        certificate: this node's, where the cluster uses TLS. Without it, and without `ray_token`, those of before.
    """

    def __init__(  # noqa: PLR0913 -- each is one fact, and all are named
        self,
        paths: ClusterPaths,
        spec: ClusterSpec,
        on_step: Callable[[Step], None],
        *,
        place: NodePlace,
        cluster_id: str,
        ray_token: str = "",
        certificate: NodeCertificate | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.paths = paths
        self.spec = spec
        self.on_step = on_step
        self.place = place
        self.cluster_id = cluster_id
        self.ray_token = ray_token
        self.certificate = certificate
        self.environ = environ
        self.steps = Steps(paths, on_step)

    async def run(self) -> ClusterRecord:
        """Join, and return this machine's record.

        Raises:
            ClusterStartError: Ray did not join; what was started is ended again.
            ConflictError: a GPU is another cluster's.
            SpecError: a GPU that the spec lists is not there.
            VersionError: Ray does not fit, or another one runs here.
        """
        version = installed_ray()
        had = load_record(self.paths)
        if had is not None and is_alive(had.ray):
            check_versions(Seen(had, ray_alive=True), version)
            if had.place == self.place and had.cluster_id == self.cluster_id and self._has_certificate(had):
                return await self._keep(had)
            self.steps.note("ray", f"the head moved from {had.place.head or 'here'} to {self.place.head}; Ray joins it")
        record = had or new_record(self.spec, self.paths, cluster_id=self.cluster_id)
        make_importable(self.paths)
        if record.ray is not None:
            await end([record.ray], grace_s=_GRACE_S)
        await sweep_ray(record.cluster_id, record.ray, self.paths.temp)
        versions = Versions(raylaunch=__version__, ray=version, python=platform.python_version())
        record = record.with_(
            spec=self.spec,
            cluster_id=self.cluster_id,
            place=self.place,
            wanted="running",
            versions=versions,
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
        """Whether this machine's Ray speaks with the others as the head's does now."""
        if not self.ray_token:  # nothing new was sent
            return True
        if self.certificate is None:
            return not record.tls
        return record.tls and tls.has_authority(self.paths, self.certificate)

    async def _keep(self, record: ClusterRecord) -> ClusterRecord:
        """Leave Ray as it runs. The steward is ended where it is of another raylaunch: Ray starts it from this one.

        A new controller has had it started anew already, but before this machine was given the new code.
        """
        pid = record.ray.pid if record.ray else 0
        self.on_step(Step("ray", "kept", f"Ray runs (pid {pid})"))
        for difference in differences(self.spec, record):
            self.steps.note("spec", difference)
        if make_importable(self.paths) or record.versions.raylaunch != __version__:
            await kill(stewards(record.ray))  # at SIGTERM, Ray would hold that it wished to end
            self.steps.note("steward", f"is started anew by Ray, as of raylaunch {__version__}; jobs go on")
        versions = record.versions.model_copy(update={"raylaunch": __version__})
        return record if versions == record.versions else save_record(self.paths, record.with_(versions=versions))

    async def _start(self, record: ClusterRecord) -> ClusterRecord:
        gpus = choose_gpus(self.spec, [] if isinstance(self.spec.gpus, int) else await detect_gpus(), self.environ)
        if gpus.gpus:
            check_gpus(self.spec, gpus, neighbours(self.paths.controller_config))
        ports = assign.ray_ports(
            record.ports, say=lambda words: self.steps.note("ports", words), avoid=(), address=ANYWHERE
        )
        record = save_record(self.paths, record.with_(ports=ports, gpu_uuids=gpus.uuids))
        ray = RayStart(self.paths, self.spec, self.cluster_id, ports, gpus, self.place, tls=record.tls)
        self.steps.begins("ray", f"starts Ray {record.versions.ray} with {gpus}, joining {self.place.head}")
        for tries_left in (2, 1, 0):
            process = await self.steps.start(ray.argv(), ray.environment(self.environ), self.paths.ray_log)
            record = save_record(self.paths, record.with_(ray=process))
            try:
                await self._joined(process)
            except DiedError:
                if not tries_left:
                    raise
                self.steps.note("ray", "it gave up, as it does on a busy machine after 30 s; it is started again")
                await sweep_ray(self.cluster_id, process, self.paths.temp)
            else:
                break
        return record

    async def _joined(self, process: ProcessIdentity) -> None:
        async def joined() -> str:
            self.steps.must_live("ray", "Ray", process, self.paths.ray_log)
            since = last_lines(self.paths.ray_log, count=200).rpartition("\n--- ")[2]
            return "" if _JOINED in since else "it has not registered yet"

        await self.steps.step("join", f"waits until Ray has joined {self.place.head}", joined, JOIN_S)
