"""Bring an embedded cluster up, step by step: only what does not run is started. The caller holds the lock."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import anyio

from raylaunch.cluster import assign
from raylaunch.cluster.controller_program import (
    admit,
    controller_argv,
    controller_environment,
    controller_status,
    not_ready,
    write_config,
)
from raylaunch.cluster.gpus import GpuChoice, choose_gpus, detect_gpus
from raylaunch.cluster.home import ClusterPaths, make_store, secret_file, storage_errors
from raylaunch.cluster.look import Seen, differences, look
from raylaunch.cluster.neighbours import check_gpus, neighbours
from raylaunch.cluster.plan import Step
from raylaunch.cluster.ports import is_free
from raylaunch.cluster.process import ProcessIdentity, end, is_alive, last_lines, start_apart
from raylaunch.cluster.ray_head import RayHead, installed_ray, jobs_answer, make_importable, nodes_alive
from raylaunch.cluster.record import (
    ClusterRecord,
    Versions,
    keep_unreadable_aside,
    new_record,
    recalled_cluster_id,
    save_record,
    store_of,
)
from raylaunch.cluster.sweep import of_controller, sweep_ray
from raylaunch.errors import ClusterStartError, VersionError
from raylaunch.spec import ClusterSpec
from raylaunch.version import __version__

JOBS_S, NODE_S, CONTROLLER_S, STEWARD_S = 180.0, 120.0, 60.0, 180.0
_HUNG_S = 15.0
_POLL_S = 0.1


class _DiedError(ClusterStartError):
    """A process ended while we waited for it."""


class BringUp:
    """One `up`: what it knows, and its steps."""

    def __init__(
        self,
        paths: ClusterPaths,
        spec: ClusterSpec,
        on_step: Callable[[Step], None],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.paths = paths
        self.asked = spec
        self.on_step = on_step
        self.environ = environ
        self.record = new_record(spec, paths)
        self.started: list[ProcessIdentity] = []

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
        self._take_record(seen, ray_version)
        self._check_fixed_port()
        try:
            await self._start_missing(ray_only=ray_only, upgrade=upgrade)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._undo()
            raise
        return await look(self.paths)

    async def _start_missing(self, *, ray_only: bool, upgrade: bool) -> None:
        """Start what does not run. What ends after it had answered is started once more: Ray gives up when it is slow.

        (Its head ends itself when its node is not listed 30 s after its start, however busy the machine is.)
        """
        for last_try in (False, True):
            await self._ray()
            await self._controller(wait=not ray_only, upgrade=upgrade and not last_try)
            try:
                await self._step("node", "waits until Ray lists this machine", self._node, NODE_S)
                if not ray_only:
                    await self._step("steward", "waits for the node's steward", self._steward, STEWARD_S)
            except _DiedError as error:
                if last_try:
                    raise
                self._note(error.step, "it ended while it was waited for; it is started again")
            else:
                return

    def _note(self, name: str, message: str) -> None:
        self.on_step(Step(name=name, state="note", message=message))

    def _tell_kept(self, seen: Seen) -> None:
        if seen.record is None or seen.record.ray is None or seen.record.controller is None:
            return
        self.on_step(Step("ray", "kept", f"Ray runs (pid {seen.record.ray.pid})"))
        self.on_step(Step("controller", "kept", f"the controller runs (pid {seen.record.controller.pid})"))
        for difference in differences(self.asked, seen.record):
            self._note("spec", difference)

    def _take_record(self, seen: Seen, ray_version: str) -> None:
        """Go on from the record. The spec that runs counts while anything of the cluster runs."""
        if aside := keep_unreadable_aside(self.paths):
            self._note("record", f"the cluster's record could not be understood; it is kept as {aside.name}")
        had = seen.record or new_record(self.asked, self.paths, cluster_id=recalled_cluster_id(self.paths))
        if seen.ray_alive or seen.controller_alive:
            for difference in differences(self.asked, had):
                self._note("spec", difference)
        else:
            had = had.with_(spec=self.asked, store=store_of(self.asked, self.paths))
        self._set_gcs_aside(had.versions.ray, ray_version)
        versions = Versions(raylaunch=__version__, ray=ray_version, python=platform.python_version())
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
            self._note("ray", f"Ray {has} does not read what Ray {had} stored; that is kept as {aside.name}")

    def _save(self, record: ClusterRecord) -> None:
        self.record = save_record(self.paths, record)

    # Ray

    async def _ray(self) -> None:
        if is_alive(self.record.ray):
            try:
                await self._wait_for_ray()
            except _DiedError:
                self._note("ray", "Ray ended while it was waited for; it is started again")
            else:
                return
        await self._start_ray()
        await self._wait_for_ray()

    async def _start_ray(self) -> None:
        if self.record.ray is not None:
            self._note("ray", f"Ray (pid {self.record.ray.pid}) is gone; it is started again")
        left = await sweep_ray(self.record.cluster_id, self.record.ray, self.paths.temp)
        if left:
            self._note("ray", f"ended {len(left)} processes that it had left behind")
        gpus = await self._gpus()
        ports = assign.ray_ports(
            self.record.ports, say=lambda words: self._note("ports", words), avoid=self._promised()
        )
        moved = any(self.record.ports.get(key) not in (None, ports[key]) for key in ("gcs", "dashboard"))
        self._save(self.record.with_(ports=self.record.ports | ports, gpu_uuids=gpus.uuids, ray=None))
        head = RayHead(self.paths, self.record.spec, self.record.cluster_id, ports, gpus)
        argv = head.argv()
        self.on_step(Step("ray", "begins", f"starts Ray {self.record.versions.ray} with {gpus}"))
        ray = await self._start(argv, head.environment(self.environ), self.paths.ray_log)
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
        await self._step("jobs", "waits for Ray's Jobs endpoint", self._jobs, JOBS_S)

    async def _jobs(self) -> str:
        self._must_live("ray", "Ray", self.record.ray, self.paths.ray_log)
        return await jobs_answer(self.record.ports, self.ray_token)

    async def _node(self) -> str:
        self._must_live("ray", "Ray", self.record.ray, self.paths.ray_log)
        return "" if await nodes_alive(self.record.ports, self.ray_token) else "Ray lists no living node"

    # The controller

    async def _controller(self, *, wait: bool, upgrade: bool) -> None:
        if is_alive(self.record.controller) and not upgrade and await self._answers_soon():
            return
        for last_try in (False, True):
            await self._start_controller()
            if not wait:
                return
            try:
                await self._step("controller", "waits for the controller", self._answering, CONTROLLER_S)
            except _DiedError:
                if last_try or self.record.spec.port or is_free(self.record.ports["controller"]):
                    raise
                self._note("controller", "its port was taken in that moment; another one is used")
            else:
                return

    async def _answers_soon(self) -> bool:
        with anyio.move_on_after(_HUNG_S):
            while is_alive(self.record.controller):
                if not await self._answering(check=False):
                    return True
                await anyio.sleep(_POLL_S)
        return False

    async def _start_controller(self) -> None:
        """Start the controller; one that hangs, or that no record knows of, is ended first. Jobs go on meanwhile."""
        left = of_controller(self.record.cluster_id)
        if left:
            self._note("controller", f"ends the controller of before (pid {left[0].pid}); jobs go on")
            await end(left, grace_s=5)
        taken = tuple(port for key, port in self.record.ports.items() if key != "controller")
        taken += tuple(range(self.record.ports["worker_min"], self.record.ports["worker_max"] + 1))
        port = assign.controller_port(
            self.record.ports,
            fixed=self.record.spec.port,
            say=lambda words: self._note("ports", words),
            avoid=taken,
        )
        self._save(self.record.with_(ports=self.record.ports | {"controller": port}, controller=None))
        write_config(self.paths, self.record)
        admit(Path(self.record.store), self.token)
        env = controller_environment(self.paths, self.record, self.environ)
        controller = await self._start(controller_argv(self.paths), env, self.paths.controller_log)
        self._save(self.record.with_(controller=controller))

    async def _answering(self, *, check: bool = True) -> str:
        if check:
            self._must_live("controller", "the controller", self.record.controller, self.paths.controller_log)
        status = await controller_status(self.record.ports["controller"], self.token)
        return status if isinstance(status, str) else ""

    async def _steward(self) -> str:
        self._must_live("ray", "Ray", self.record.ray, self.paths.ray_log)
        self._must_live("controller", "the controller", self.record.controller, self.paths.controller_log)
        return not_ready(await controller_status(self.record.ports["controller"], self.token))

    # How steps begin, wait and fail

    async def _start(self, argv: list[str], env: dict[str, str], log: Path) -> ProcessIdentity:
        _turn_over(log)
        first_line = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} raylaunch {__version__} starts: {' '.join(argv)}\n"
        process = await start_apart(argv, env=env, cwd=Path("/"), log=log, first_line=first_line)
        self.started.append(process)
        return process

    async def _step(self, name: str, words: str, check: Callable[[], Awaitable[str]], limit_s: float) -> None:
        """Poll `check` until it returns an empty string; what it returns else is why it is not so yet."""
        self.on_step(Step(name, "begins", words))
        began, why = time.monotonic(), "it was not asked"
        while time.monotonic() - began < limit_s:
            why = await check()
            if not why:
                self.on_step(Step(name, "done", words.replace("waits", "waited", 1), time.monotonic() - began))
                return
            await anyio.sleep(_POLL_S)
        log = self.paths.controller_log if name in {"controller", "steward"} else self.paths.ray_log
        msg = f"{name}: not ready after {limit_s:.0f} s: {why}{_quoted(log)}"
        raise ClusterStartError(msg, hint=f"see {log}; then raylaunch down, raylaunch up", step=name, log_path=str(log))

    def _must_live(self, step: str, what: str, identity: ProcessIdentity | None, log: Path) -> None:
        if not is_alive(identity):
            msg = f"{what} ended while it was being started{_quoted(log)}"
            raise _DiedError(msg, hint=f"see {log}", step=step, log_path=str(log))

    async def _undo(self) -> None:
        """End what this `up` started and could not bring to work; what ran before stays."""
        if not self.started:
            return
        ray = self.record.ray if self.record.ray in self.started else None
        await end([one for one in self.started if one != ray], grace_s=5)
        if ray is not None:
            await end([ray], grace_s=15)
            await sweep_ray(self.record.cluster_id, ray, self.paths.temp)


def check_versions(seen: Seen, installed: str) -> bool:
    """Return whether the controller that runs is an older one, to be replaced.

    Raises:
        VersionError: another Ray, or a controller newer than this raylaunch, runs.
    """
    record = seen.record
    if record is None or not (seen.ray_alive or seen.controller_alive):
        return False
    runs = record.versions
    if runs.ray != installed:
        msg = f"cluster {record.name} runs Ray {runs.ray}, and Ray {installed} is installed here"
        raise VersionError(msg, hint="raylaunch down, then raylaunch up starts it with this Ray (running jobs end)")
    if _number(runs.raylaunch) > _number(__version__):
        msg = f"cluster {record.name} was started by raylaunch {runs.raylaunch}, and this is {__version__}"
        raise VersionError(msg, hint=f"upgrade this one to {runs.raylaunch}, or raylaunch down, then raylaunch up")
    return seen.controller_alive and runs.raylaunch != __version__


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _quoted(log: Path) -> str:
    lines = last_lines(log)
    return f"; the last lines of {log}:\n    " + lines.replace("\n", "\n    ") if lines else f"; {log} is empty"


def _turn_over(log: Path, *, limit: int = 16 * 1024 * 1024) -> None:
    with storage_errors(log):
        if log.exists() and log.stat().st_size > limit:
            log.replace(log.with_name(f"{log.name}.1"))
