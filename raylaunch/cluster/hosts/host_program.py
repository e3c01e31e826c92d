"""The host program, ``python -m raylaunch.cluster.on_host``: started over SSH, it carries out one request on a host.

The request is JSON on stdin; the response is JSON lines on stdout: steps, then one result or one error. Secrets travel
in these, never in arguments. Every request may be repeated.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Literal

import anyio
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from raylaunch.cluster.local import backend
from raylaunch.cluster.local.autostart import disable_watchdog, ensure_watchdog
from raylaunch.cluster.local.inspect import client_token, inspect_cluster, status_of
from raylaunch.cluster.local.node_up import BringUp, WorkerJoin
from raylaunch.cluster.record import ClusterVersions, NodePlace, cluster_lock
from raylaunch.cluster.tls import NodeCertificate, issue
from raylaunch.cluster.types import Step
from raylaunch.errors import ConflictError, RaylaunchError
from raylaunch.models.cluster import ClusterStatus
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import cluster_paths, make_cluster_dirs, secret_file, share_job_folders
from raylaunch.version import __version__

_LOCK_S = 600.0


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeadUpRequest(_Message):
    """Bring the cluster's head up on this host: Ray's head and the controller."""

    verb: Literal["up"] = "up"
    spec: ClusterSpec
    place: NodePlace
    members: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Nodes that get a certificate if the cluster uses TLS: addresses by name."""


class JoinRequest(_Message):
    """Bring this host into the cluster of a head."""

    verb: Literal["join"] = "join"
    spec: ClusterSpec
    place: NodePlace
    cluster_id: str
    ray_token: str = Field(repr=False)
    certificate: NodeCertificate | None = None


class InspectRequest(_Message):
    """Return which parts of the cluster run on this host."""

    verb: Literal["look"] = "look"
    name: str
    host: str = ""
    """The worker's name; empty for the head."""


class DownRequest(_Message):
    """End every part of the cluster on this host."""

    verb: Literal["down"] = "down"
    name: str
    host: str = ""
    """The worker's name; empty for the head."""


Request = Annotated[HeadUpRequest | JoinRequest | InspectRequest | DownRequest, Field(discriminator="verb")]
_REQUEST: TypeAdapter[HeadUpRequest | JoinRequest | InspectRequest | DownRequest] = TypeAdapter(Request)


class HostState(_Message):
    """The parts of a cluster that run on a host; `wanted` is empty if it was never started.

    It contains the tokens: the client reached the host as the owner of its files.
    """

    name: str
    wanted: str = ""
    place: NodePlace = NodePlace()
    cluster_id: str = ""
    owner: str = ""
    ray_alive: bool = False
    controller_alive: bool = False
    problems: tuple[str, ...] = ()
    kept: str = ""
    """What starts it after a reboot, as text; empty if nothing does."""
    gpus: int = 0
    """The GPUs of Ray, real or logical."""
    ports: dict[str, int] = Field(default_factory=dict)
    versions: ClusterVersions = ClusterVersions()
    raylaunch: str = __version__
    token: str = Field(default="", repr=False)
    ray_token: str = Field(default="", repr=False)
    tls: bool = False
    certificates: dict[str, NodeCertificate] = Field(default_factory=dict, repr=False)
    """For `HeadUpRequest.members`, if the head's Ray uses TLS."""
    status: ClusterStatus | None = None
    """The status of the head's controller; None on a worker."""


class HostDownResult(_Message):
    """What `down` ended, as text; no process of the cluster is left on this host."""

    ended: tuple[str, ...]
    store: str
    notes: tuple[str, ...] = ()


def folder_name(cluster: str, worker: str) -> str:
    """Return the name of the cluster's folder on a host: each worker has its own, because homes may be shared."""
    return f"{cluster}.{worker}"[:63] if worker else cluster


async def _up(request: HeadUpRequest, tell: Callable[[Step], None]) -> HostState:
    paths = cluster_paths(request.spec.name)
    make_cluster_dirs(paths)
    async with cluster_lock(paths, limit_s=_LOCK_S):
        seen = await inspect_cluster(paths)
        if seen.record and seen.ray_alive and seen.record.place.address != request.place.address:
            runs, wanted = seen.record.place.ray_address, request.place.ray_address
            msg = f"cluster {paths.name} is running on {runs}, not on {wanted}"
            raise ConflictError(
                msg, hint="run raylaunch down, then raylaunch up: Ray cannot change its address while it runs"
            )
        await BringUp(paths, request.spec, tell, place=request.place).run()
    kept = await ensure_watchdog(paths)
    state = await _inspect(InspectRequest(name=paths.name))
    issued = {name: issue(paths, name, addresses) for name, addresses in request.members.items() if state.tls}
    return state.model_copy(update={"kept": kept, "certificates": issued})


async def _join(request: JoinRequest, tell: Callable[[Step], None]) -> HostState:
    paths = cluster_paths(folder_name(request.spec.name, request.place.host))
    make_cluster_dirs(paths)
    share_job_folders(paths, request.spec.name)
    async with cluster_lock(paths, limit_s=_LOCK_S):
        joining = WorkerJoin(
            paths,
            request.spec,
            tell,
            place=request.place,
            cluster_id=request.cluster_id,
            ray_token=request.ray_token,
            certificate=request.certificate,
        )
        await joining.run()
    kept = await ensure_watchdog(paths)
    return (await _inspect(InspectRequest(name=request.spec.name, host=request.place.host))).model_copy(
        update={"kept": kept}
    )


async def _inspect(request: InspectRequest) -> HostState:
    paths = cluster_paths(folder_name(request.name, request.host))
    seen = await inspect_cluster(paths)
    record = seen.record
    if record is None:
        return HostState(name=request.name)
    worker = record.place.is_worker
    problems = () if worker and seen.ray_alive else seen.problems
    return HostState(
        name=record.name,
        wanted=record.wanted,
        place=record.place,
        cluster_id=record.cluster_id,
        owner=record.owner,
        ray_alive=seen.ray_alive,
        controller_alive=seen.controller_alive,
        problems=problems if record.wanted == "running" else (),
        gpus=record.spec.gpus if isinstance(record.spec.gpus, int) else len(record.gpu_uuids),
        ports=record.ports,
        versions=record.versions,
        token=client_token(paths),
        ray_token="" if worker else secret_file(paths.ray_token),
        tls=record.tls,
        status=None if worker else status_of(seen, paths),
    )


async def _down(request: DownRequest) -> HostDownResult:
    paths = cluster_paths(folder_name(request.name, request.host))
    report = await backend.down(ClusterSpec(name=paths.name))
    await disable_watchdog(paths)
    return HostDownResult(ended=tuple(str(one) for one in report.ended), store=report.store, notes=report.notes)


async def _serve(
    request: HeadUpRequest | JoinRequest | InspectRequest | DownRequest, tell: Callable[[Step], None]
) -> BaseModel:
    match request:
        case HeadUpRequest():
            return await _up(request, tell)
        case JoinRequest():
            return await _join(request, tell)
        case InspectRequest():
            return await _inspect(request)
        case DownRequest():
            return await _down(request)


def main() -> int:
    """Read the request, carry it out, and write the result; return the exit status."""
    os.umask(0o077)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing else may print between the responses

    def send(kind: str, body: object) -> None:
        answers.write(json.dumps({kind: body}, separators=(",", ":")) + "\n")
        answers.flush()

    def tell(step: Step) -> None:
        send("step", {"name": step.name, "state": step.state, "message": step.message, "seconds": step.seconds})

    try:
        result = anyio.run(_serve, _REQUEST.validate_json(sys.stdin.buffer.read()), tell)
    except ValidationError as error:
        send(
            "error",
            {"code": "version", "message": f"raylaunch {__version__} does not understand the request: {error}"},
        )
        return 2
    except RaylaunchError as error:
        send("error", {"code": error.code, "message": error.message, "hint": error.hint})
        return 1
    send("result", result.model_dump(mode="json"))
    return 0
