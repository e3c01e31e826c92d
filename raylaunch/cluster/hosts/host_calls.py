"""Requests to the host program (`raylaunch.cluster.on_host`) over SSH, and ending a cluster's processes by them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

import anyio
from pydantic import BaseModel, ValidationError

from raylaunch.cluster.client_record import ClientRecord, HeadProgram, load_client, refuse_joined, save_client
from raylaunch.cluster.hosts.host_program import (
    DownRequest,
    HeadUpRequest,
    HostDownResult,
    JoinRequest,
)
from raylaunch.cluster.probe.choices import target_of
from raylaunch.cluster.record import cluster_lock
from raylaunch.cluster.types import DownReport, Ended, Step
from raylaunch.errors import (
    ClusterDownError,
    ClusterStartError,
    ConflictError,
    NotFoundError,
    RaylaunchError,
    VersionError,
    from_wire,
)
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import cluster_paths
from raylaunch.ssh.host import SSHHost, machine
from raylaunch.ssh.target import OnPrompt

_Answer = TypeVar("_Answer", bound=BaseModel)

UP_S = 600.0
DOWN_S = 120.0
_LOCK_S = 1800.0


async def call_host(
    connection: SSHHost,
    program: HeadProgram,
    request: HeadUpRequest | JoinRequest | DownRequest,
    answer: type[_Answer],
    *,
    on_step: Callable[[Step], None] = lambda _step: None,
) -> _Answer:
    """Let the host program carry out a request; steps are reported as they come.

    Raises:
        RaylaunchError: the error of the host program, or of the connection.
    """
    limit_s = DOWN_S if isinstance(request, DownRequest) else UP_S
    argv = [program.python, "-I", "-m", "raylaunch.cluster.on_host"]
    body = request.model_dump_json().encode()
    env = {"RAYLAUNCH_HOME": program.root}
    result: object = None
    async with connection.lines(argv, input=body, limit_s=limit_s, env=env, step=request.verb) as lines:
        async for line in lines:
            kind, value = _read(line)
            if kind == "step" and isinstance(value, dict):
                on_step(Step(**value))
            elif kind == "error" and isinstance(value, dict):
                raise _error(connection, value)
            elif kind == "result":
                result = value
    if result is None:
        msg = f"{connection.name}: the host program ended without an answer (exit status {lines.status})"
        said = lines.err.decode(errors="replace").strip().splitlines()[-5:]
        raise ClusterStartError(msg + "".join(f"\n    {one}" for one in said), hint="run raylaunch up again")
    try:
        return answer.model_validate(result)
    except ValidationError as error:
        msg = f"{connection.name}: the host program has another version: {error}"
        raise VersionError(msg, hint="run raylaunch up, which installs this version") from None


def _read(line: bytes) -> tuple[str, object]:
    """Parse one response; other lines come from the host's shell and are ignored."""
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return "", None
    return next(iter(read.items())) if isinstance(read, dict) and len(read) == 1 else ("", None)


def _error(connection: SSHHost, value: dict[str, object]) -> RaylaunchError:
    message, hint = str(value.get("message", "")), str(value.get("hint", ""))
    return from_wire(str(value.get("code", "")), f"{connection.name}: {message}", hint)


class Teardown:
    """Ends a cluster's processes on hosts; collects what was ended and what failed.

    Args:
        record: of the cluster, with the hosts to end.
        on_prompt: asks a person; None if nobody is there.
    """

    def __init__(self, record: ClientRecord, *, on_prompt: OnPrompt | None = None) -> None:
        self._record = record
        self._prompt = on_prompt
        self.ended: list[Ended] = []
        self.notes: list[str] = []
        self.errors: dict[str, RaylaunchError] = {}
        """Errors by host."""
        self.store = ""
        """Folder of the store on the head."""

    async def run(self) -> None:
        """End it on every host of the record; a host that fails does not stop the others."""
        async with anyio.create_task_group() as group:
            for name in self._record.hosts:
                if name != self._record.head:
                    group.start_soon(self._host, name)
        if self._record.head in self._record.hosts:
            await self._host(self._record.head)

    async def _host(self, name: str) -> None:
        worker = "" if name == self._record.head else name
        cluster = self._record.spec.name
        try:
            async with machine(target_of(self._record.hosts[name]), on_prompt=self._prompt) as connection:
                request = DownRequest(name=cluster, host=worker)
                done = await call_host(connection, self._record.programs[name], request, HostDownResult)
        except RaylaunchError as error:
            self.errors[name] = error
            return
        self.ended += [Ended(f"{name}: {one}") for one in done.ended]
        self.notes += [f"{name}: {one}" for one in done.notes]
        if not worker:
            self.store = f"{name}:{done.store}"


def known(cluster: str) -> ClientRecord:
    """Return the record of a cluster over SSH that was brought up from here.

    Raises:
        ClusterDownError: there is none.
        AccessError: somebody else runs it.
    """
    record = load_client(cluster_paths(cluster))
    if record is None:
        msg = f"cluster {cluster} was not brought up from here"
        raise ClusterDownError(msg, hint="bring it up: raylaunch up")
    refuse_joined(record, "changed")
    return record


def check_leaves(record: ClientRecord, host: str) -> None:
    """Check that a host can leave the cluster. Pure.

    Raises:
        NotFoundError: the cluster has no such host.
        ConflictError: it is the head.
    """
    if host not in record.hosts and host not in {one.name for one in record.spec.host_specs()}:
        has = ", ".join(record.hosts) or "none"
        msg = f"cluster {record.spec.name} has no host {host!r}; it has {has}"
        raise NotFoundError(msg, hint="list them: raylaunch status")
    if host == record.head or host == record.spec.host_specs()[0].name:
        msg = f"{host} is the head of cluster {record.spec.name}: records, queue and logs are there"
        raise ConflictError(msg, hint="to end the whole cluster: raylaunch down")


async def remove_host(
    cluster: str, host: str, *, forget: bool = False, on_prompt: OnPrompt | None = None
) -> DownReport:
    """End everything on a host, verify that no process is left, and forget the host.

    Args:
        cluster: the cluster's name.
        host: the host's name.
        forget: do not connect to the host, which may be gone permanently.
        on_prompt: asks a person; None if nobody is there.

    Raises:
        ClusterDownError: the cluster was not brought up from here.
        NotFoundError: the cluster has no such host.
        ConflictError: it is the head.
        HostError: it could not be reached, or something there could not be ended; it stays a host of the cluster.
    """
    paths, began = cluster_paths(cluster), time.monotonic()
    async with cluster_lock(paths, limit_s=_LOCK_S):
        record = known(cluster)
        check_leaves(record, host)
        work = Teardown(
            record.with_(hosts={host: record.hosts[host]} if host in record.hosts else {}), on_prompt=on_prompt
        )
        if not forget:
            await work.run()
            for error in work.errors.values():
                raise error
        hosts = {name: one for name, one in record.hosts.items() if name != host}
        programs = {name: one for name, one in record.programs.items() if name != host}
        save_client(paths, record.with_(spec=without(record.spec, host), hosts=hosts, programs=programs))
    return DownReport(
        cluster=cluster, ended=tuple(work.ended), store="", notes=tuple(work.notes), seconds=time.monotonic() - began
    )


def without(spec: ClusterSpec, host: str) -> ClusterSpec:
    """Return the spec without a host. Pure. It keeps its binding: hosts may join the last one again."""
    bind = spec.bind if spec.loopback else "network"
    left = tuple(one for one in spec.hosts if one.name != host)
    return spec.model_copy(update={"hosts": left, "bind": bind})
