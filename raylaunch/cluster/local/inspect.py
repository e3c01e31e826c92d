"""What is seen of an embedded cluster: its record, which of its processes live, and what its controller says."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from raylaunch.cluster.local.controller_process import controller_status, not_ready
from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.processes import ProcessIdentity, is_alive
from raylaunch.cluster.record import ClusterRecord, load_record
from raylaunch.errors import RayVersionError, VersionError
from raylaunch.models.cluster import ClusterStatus, ControllerStatus, ProcessView
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths
from raylaunch.version import __version__, is_older


@dataclass(frozen=True)
class LocalInspection:
    """An embedded cluster at one moment."""

    record: ClusterRecord | None
    ray_alive: bool = False
    controller_alive: bool = False
    says: ControllerStatus | str = "it does not run"
    """The controller's answer, or why there is none."""

    @property
    def runs(self) -> bool:
        """Whether anything of the cluster runs; a Ray that somebody else runs is none of it."""
        ours = self.ray_alive and not (self.record and self.record.spec.kind == "existing")
        return ours or self.controller_alive

    @property
    def silent(self) -> bool:
        """Whether the controller runs and does not respond."""
        return self.controller_alive and isinstance(self.says, str)

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps it from taking jobs, in words; empty for a healthy cluster."""
        if self.record is None or not self.runs:
            return ("it does not run",)
        found = []
        if not self.ray_alive:
            found.append(_dead("Ray", self.record.ray))
        if not self.controller_alive:
            found.append(_dead("the controller", self.record.controller))
        elif trouble := not_ready(self.says):
            restarts = "; a command that needs it restarts it, on a host its watchdog" if self.silent else ""
            found.append(f"{trouble}{restarts}")
        return tuple(found)


def _dead(what: str, identity: ProcessIdentity | None) -> str:
    return f"{what} (pid {identity.pid}) is dead" if identity else f"{what} does not run"


async def look(paths: ClusterPaths) -> LocalInspection:
    """Look at the cluster, and change nothing.

    Raises:
        ConflictError: the record was written on another machine.
        StorageError: the record cannot be read.
    """
    record = load_record(paths)
    if record is None:
        return LocalInspection(None)
    controller_alive = is_alive(record.controller)
    says: ControllerStatus | str = "it does not run"
    if controller_alive:
        says = await controller_status(record.ports["controller"], client_token(paths))
    ray_alive = is_alive(record.ray) or record.spec.kind == "existing"  # whether that lives, its controller says
    return LocalInspection(record, ray_alive=ray_alive, controller_alive=controller_alive, says=says)


def client_token(paths: ClusterPaths) -> str:
    """Return the client's token for the controller; empty when there is none yet."""
    try:
        return paths.token.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def differences(spec: ClusterSpec, record: ClusterRecord) -> tuple[str, ...]:
    """Say where the cluster that runs was started with something else than what is asked for now."""
    asked, runs = spec.model_dump(mode="json"), record.spec.model_dump(mode="json")
    asked["tls"], runs["tls"] = spec.uses_tls, record.tls
    return tuple(
        f"it runs with {key}: {runs[key]!r}, not {asked[key]!r}; raylaunch down, then raylaunch up changes that"
        for key in asked
        if asked[key] != runs[key]
    )


def status_of(seen: LocalInspection, paths: ClusterPaths) -> ClusterStatus:
    """Return what is seen as the status that all fronts show."""
    record = seen.record
    if record is None:
        return ClusterStatus(name=paths.name, kind="local", state="stopped", problems=_unreadable(paths))
    running = seen.runs
    facts = seen.says if isinstance(seen.says, ControllerStatus) else None
    problems = (*seen.problems, *(facts.problems if facts else ())) if running else ()
    return ClusterStatus(
        name=record.name,
        kind="local",
        state="stopped" if not running else "degraded" if seen.problems else "running",
        problems=problems,
        controller=_controller_view(seen, paths) if running else None,
        ray=_ray_view(seen, paths) if running else None,
        ray_ports={key: port for key, port in record.ports.items() if key != "controller"} if running else {},
        nodes=facts.nodes if facts else (),
        queued=facts.queued if facts else 0,
        running=facts.running if facts else 0,
        store=record.store,
        store_free=shutil.disk_usage(record.store).free if os.path.isdir(record.store) else None,  # noqa: PTH112 -- a text, not a path of ours
        gpus_logical=isinstance(record.spec.gpus, int) and record.spec.gpus > 0,
        owner=record.owner,
    )


def _unreadable(paths: ClusterPaths) -> tuple[str, ...]:
    return (f"its record {paths.record} cannot be understood; raylaunch up heals it",) if paths.record.exists() else ()


def _controller_view(seen: LocalInspection, paths: ClusterPaths) -> ProcessView | None:
    if seen.record is None or seen.record.controller is None:
        return None
    port = seen.record.ports["controller"]
    return _view(
        seen.record.controller, seen.controller_alive, port, seen.record.versions.raylaunch, str(paths.controller_log)
    )


def _ray_view(seen: LocalInspection, paths: ClusterPaths) -> ProcessView | None:
    if seen.record is None or seen.record.ray is None:
        return None
    port = seen.record.ports["dashboard"]
    return _view(seen.record.ray, seen.ray_alive, port, seen.record.versions.ray, str(paths.ray_log))


def _view(identity: ProcessIdentity, alive: bool, port: int, version: str, log: str) -> ProcessView:  # noqa: FBT001 -- private, and named at its uses
    return ProcessView(
        pid=identity.pid,
        started_at=identity.started_at,
        alive=alive,
        port=port,
        url=f"http://{LOOPBACK}:{port}",
        version=version,
        log=log,
    )


def check_versions(seen: LocalInspection, installed: str) -> bool:
    """Return whether the controller that runs is an older one, to be replaced.

    Raises:
        VersionError: another Ray, or a controller newer than this raylaunch, runs.
    """
    record = seen.record
    if record is None or not (seen.ray_alive or seen.controller_alive):
        return False
    if record.versions.ray != installed:
        msg = f"cluster {record.name} runs Ray {record.versions.ray}, and Ray {installed} is installed here"
        hint = "raylaunch up --upgrade: when no job runs any more, it starts the cluster anew with this Ray"
        raise RayVersionError(msg, hint=hint)
    return check_ours(seen)


def check_ours(seen: LocalInspection) -> bool:
    """Return whether the controller that runs is an older one, to be replaced.

    Raises:
        VersionError: it is newer than this raylaunch.
    """
    record = seen.record
    if record is None or not (seen.ray_alive or seen.controller_alive):
        return False
    runs = record.versions.raylaunch
    if is_older(__version__, runs):
        msg = f"cluster {record.name} was started by raylaunch {runs}, and this is {__version__}"
        raise VersionError(msg, hint=f"upgrade this one to {runs}, or raylaunch down, then raylaunch up")
    return seen.controller_alive and runs != __version__
