"""An embedded cluster inspected: its record, its live processes, its controller's status, and its versions."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

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
    says: ControllerStatus | str = "not running"
    """The controller's status, or the reason why there is none."""

    @property
    def runs(self) -> bool:
        """Whether any part of the cluster runs, not counting a Ray that somebody else runs."""
        ours = self.ray_alive and not (self.record and self.record.spec.kind == "existing")
        return ours or self.controller_alive

    @property
    def silent(self) -> bool:
        """Whether the controller runs and does not respond."""
        return self.controller_alive and isinstance(self.says, str)

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps it from taking jobs; empty for a healthy cluster."""
        if self.record is None or not self.runs:
            return ("it is not running",)
        found = []
        if not self.ray_alive:
            found.append(_exited("Ray", self.record.ray))
        if not self.controller_alive:
            found.append(_exited("the controller", self.record.controller))
        elif trouble := not_ready(self.says):
            restarts = "; a command that needs it restarts it, on a host its watchdog" if self.silent else ""
            found.append(f"{trouble}{restarts}")
        return tuple(found)


def _exited(what: str, identity: ProcessIdentity | None) -> str:
    return f"{what} (pid {identity.pid}) has exited" if identity else f"{what} is not running"


async def inspect_cluster(paths: ClusterPaths) -> LocalInspection:
    """Inspect the cluster, without changing anything.

    Raises:
        ConflictError: the record was written on another machine.
        StorageError: the record cannot be read.
    """
    record = load_record(paths)
    if record is None:
        return LocalInspection(None)
    controller_alive = is_alive(record.controller)
    says: ControllerStatus | str = "not running"
    if controller_alive:
        says = await controller_status(record.ports["controller"], client_token(paths))
    ray_alive = is_alive(record.ray) or record.spec.kind == "existing"  # its controller checks that
    return LocalInspection(record, ray_alive=ray_alive, controller_alive=controller_alive, says=says)


def client_token(paths: ClusterPaths) -> str:
    """Return the client's token for the controller; empty if there is none yet."""
    try:
        return paths.token.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def differences(spec: ClusterSpec, record: ClusterRecord) -> tuple[str, ...]:
    """Return the settings that differ between the running cluster and `spec`, with how to change them."""
    wanted, runs = spec.model_dump(mode="json"), record.spec.model_dump(mode="json")
    wanted["tls"], runs["tls"] = spec.uses_tls, record.tls
    return tuple(
        f"it runs with {key}: {runs[key]!r}, not {wanted[key]!r}; to change that: raylaunch down, then raylaunch up"
        for key in wanted
        if wanted[key] != runs[key]
    )


def status_of(seen: LocalInspection, paths: ClusterPaths) -> ClusterStatus:
    """Return an inspection as the status that all interfaces show."""
    record = seen.record
    if record is None:
        return ClusterStatus(name=paths.name, kind="local", state="stopped", problems=_unreadable(paths))
    running = seen.runs
    facts = seen.says if isinstance(seen.says, ControllerStatus) else None
    problems = (*seen.problems, *(facts.problems if facts else ())) if running else ()
    controller = _view(
        record.controller,
        alive=seen.controller_alive,
        port=record.ports.get("controller", 0),
        version=record.versions.raylaunch,
        log=paths.controller_log,
    )
    ray = _view(
        record.ray,
        alive=seen.ray_alive,
        port=record.ports.get("dashboard", 0),
        version=record.versions.ray,
        log=paths.ray_log,
    )
    return ClusterStatus(
        name=record.name,
        kind="local",
        state="stopped" if not running else "degraded" if seen.problems else "running",
        problems=problems,
        controller=controller if running else None,
        ray=ray if running else None,
        ray_ports={key: port for key, port in record.ports.items() if key != "controller"} if running else {},
        nodes=facts.nodes if facts else (),
        queued=facts.queued if facts else 0,
        running=facts.running if facts else 0,
        store=record.store,
        store_free=shutil.disk_usage(record.store).free if os.path.isdir(record.store) else None,  # noqa: PTH112 -- a string
        gpus_logical=isinstance(record.spec.gpus, int) and record.spec.gpus > 0,
        owner=record.owner,
    )


def _unreadable(paths: ClusterPaths) -> tuple[str, ...]:
    return (f"its record {paths.record} cannot be read; raylaunch up repairs it",) if paths.record.exists() else ()


def _view(identity: ProcessIdentity | None, *, alive: bool, port: int, version: str, log: Path) -> ProcessView | None:
    if identity is None:
        return None
    url = f"http://{LOOPBACK}:{port}"
    started_at, pid = identity.started_at, identity.pid
    return ProcessView(pid=pid, started_at=started_at, alive=alive, port=port, url=url, version=version, log=str(log))


def check_versions(seen: LocalInspection, installed: str = "") -> bool:
    """Return whether an older controller runs, which is to be replaced.

    Args:
        seen: the cluster.
        installed: the Ray here; empty if it need not be the cluster's.

    Raises:
        VersionError: another Ray, or a controller newer than this raylaunch, runs.
    """
    record = seen.record
    if record is None or not (seen.ray_alive or seen.controller_alive):
        return False
    if installed and record.versions.ray != installed:
        msg = f"cluster {record.name} runs Ray {record.versions.ray}, but Ray {installed} is installed here"
        hint = "raylaunch up --upgrade restarts the cluster with this Ray once no job runs"
        raise RayVersionError(msg, hint=hint)
    runs = record.versions.raylaunch
    if is_older(__version__, runs):
        msg = f"cluster {record.name} was started by raylaunch {runs}, and this is {__version__}"
        raise VersionError(msg, hint=f"upgrade raylaunch here to {runs}, or run raylaunch down, then raylaunch up")
    return seen.controller_alive and runs != __version__
