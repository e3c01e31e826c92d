"""The host program, ``python -m raylaunch.cluster.on_host``: started over SSH, it carries out one request on a host.

The request is JSON on stdin; the response is JSON lines on stdout: steps, then one result or one error. Secrets travel
in these, never in arguments. Every request may be repeated.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import anyio
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from raylaunch.cluster.local import backend
from raylaunch.cluster.local.autostart import disable_watchdog, ensure_watchdog
from raylaunch.cluster.local.inspect import client_token, inspect_cluster
from raylaunch.cluster.local.node_up import BringUp, WorkerJoin
from raylaunch.cluster.record import ClusterRecord, NodePlace, cluster_lock
from raylaunch.cluster.tls import NodeCertificate, issue
from raylaunch.cluster.types import Step
from raylaunch.errors import ConflictError, RaylaunchError
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


class DownRequest(_Message):
    """End every part of the cluster on this host."""

    verb: Literal["down"] = "down"
    name: str
    host: str = ""
    """The worker's name; empty for the head."""


Request = HeadUpRequest | JoinRequest | DownRequest
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="verb")])


class HostState(_Message):
    """The part of a cluster that was started on a host.

    It contains the tokens: the client reached the host as the owner of its files.
    """

    name: str
    place: NodePlace = NodePlace()
    cluster_id: str = ""
    owner: str = ""
    gpus: int = 0
    """The GPUs of Ray, real or logical."""
    ports: dict[str, int] = Field(default_factory=dict)
    token: str = Field(default="", repr=False)
    ray_token: str = Field(default="", repr=False)
    certificates: dict[str, NodeCertificate] = Field(default_factory=dict, repr=False)
    """For `HeadUpRequest.members`, if the head's Ray uses TLS."""


class HostDownResult(_Message):
    """What `down` ended, as text; no process of the cluster is left on this host."""

    ended: tuple[str, ...]
    store: str
    notes: tuple[str, ...] = ()


def folder_name(cluster: str, worker: str) -> str:
    """Return the name of the cluster's folder on a host: each worker has its own, because homes may be shared."""
    return f"{cluster}.{worker}"[:63] if worker else cluster


async def _up(request: HeadUpRequest, on_step: Callable[[Step], None]) -> HostState:
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
        record = (await BringUp(paths, request.spec, on_step, place=request.place).run()).record
    if record is None:  # it was just written
        raise AssertionError
    await ensure_watchdog(paths)
    issued = {name: issue(paths, name, addresses) for name, addresses in request.members.items() if record.tls}
    return _state(record, token=client_token(paths), ray_token=secret_file(paths.ray_token), certificates=issued)


async def _join(request: JoinRequest, on_step: Callable[[Step], None]) -> HostState:
    paths = cluster_paths(folder_name(request.spec.name, request.place.host))
    make_cluster_dirs(paths)
    share_job_folders(paths, request.spec.name)
    async with cluster_lock(paths, limit_s=_LOCK_S):
        joining = WorkerJoin(
            paths,
            request.spec,
            on_step,
            place=request.place,
            cluster_id=request.cluster_id,
            ray_token=request.ray_token,
            certificate=request.certificate,
        )
        record = await joining.run()
    await ensure_watchdog(paths)
    return _state(record)


def _state(
    record: ClusterRecord,
    *,
    token: str = "",
    ray_token: str = "",
    certificates: Mapping[str, NodeCertificate] | None = None,
) -> HostState:
    return HostState(
        name=record.name,
        place=record.place,
        cluster_id=record.cluster_id,
        owner=record.owner,
        gpus=record.spec.gpus if isinstance(record.spec.gpus, int) else len(record.gpu_uuids),
        ports=record.ports,
        token=token,
        ray_token=ray_token,
        certificates=dict(certificates or {}),
    )


async def _down(request: DownRequest) -> HostDownResult:
    paths = cluster_paths(folder_name(request.name, request.host))
    report = await backend.down(ClusterSpec(name=paths.name))
    await disable_watchdog(paths)
    return HostDownResult(ended=tuple(str(one) for one in report.ended), store=report.store, notes=report.notes)


async def _serve(request: Request, on_step: Callable[[Step], None]) -> BaseModel:
    match request:
        case HeadUpRequest():
            return await _up(request, on_step)
        case JoinRequest():
            return await _join(request, on_step)
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

    def on_step(step: Step) -> None:
        send("step", {"name": step.name, "state": step.state, "message": step.message, "seconds": step.seconds})

    try:
        result = anyio.run(_serve, _REQUEST.validate_json(sys.stdin.buffer.read()), on_step)
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
