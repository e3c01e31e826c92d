"""Check all hosts of a cluster in parallel, and report problems with fixes. Changes nothing."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raylaunch.cluster.doctor.checks_cluster import problems
from raylaunch.cluster.doctor.problem import Problem
from raylaunch.cluster.probe.facts import HostFacts
from raylaunch.cluster.probe.probe import CommandRunner, probe
from raylaunch.cluster.trust import check_accepted
from raylaunch.errors import ConflictError, HostTimeoutError, RaylaunchError, StorageError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec
from raylaunch.paths import cluster_paths, make_private_dir, raylaunch_home, write_private
from raylaunch.ssh.target import OnPrompt, OnWait

YOUNG_S = 3600.0
"""Older results are outdated: disks fill, and people fix problems."""

_log = logging.getLogger(__name__)


class LastLook(BaseModel):
    """The problems of a cluster's hosts at one time, blocking ones first."""

    model_config = ConfigDict(frozen=True)

    at: float
    """Seconds since the epoch."""
    hosts: tuple[str, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def blocked(self) -> tuple[str, ...]:
        """The hosts on which `up` would not start."""
        ill = {one.host for one in self.problems if one.level == "blocking"}
        return tuple(host for host in self.hosts if host in ill or "" in ill)


def keep_problems(spec: ClusterSpec, problems: Sequence[Problem]) -> LastLook:
    """Save the current problems of all hosts of `spec`. A failed write is only logged."""
    hosts = tuple(host.name for host in hosts_to_check(spec))
    look = LastLook(at=time.time(), hosts=hosts, problems=tuple(problems))
    file = _file(spec)
    try:
        for folder in (file.parent.parent.parent, file.parent.parent, file.parent):
            make_private_dir(folder)
        write_private(file, look.model_dump_json(indent=2) + "\n")
    except (ConflictError, StorageError) as error:
        _log.warning("the doctor's results could not be saved: %s", error.message)
    return look


def last_look(spec: ClusterSpec, *, now: float) -> LastLook | None:
    """Return the last results; None if they are older than an hour, or of other hosts."""
    try:
        look = LastLook.model_validate_json(_file(spec).read_bytes())
    except (OSError, ValidationError):
        return None
    same = look.hosts == tuple(host.name for host in hosts_to_check(spec))
    return look if same and 0 <= now - look.at <= YOUNG_S else None


def hosts_to_check(spec: ClusterSpec) -> tuple[HostSpec, ...]:
    """Return the hosts that the doctor checks, in the order of cluster.yaml; for an embedded cluster this machine."""
    return spec.host_specs() if spec.kind == "ssh" else (_this_host(spec),)


def _this_host(spec: ClusterSpec) -> HostSpec:
    name = platform.node().partition(".")[0]
    return HostSpec(
        host="localhost", name=name if name.isalnum() else "here", root=str(raylaunch_home()), store=spec.store
    )


def _file(spec: ClusterSpec) -> Path:
    return cluster_paths(spec.name).root / "doctor.json"


CONNECT_S = 20.0
LIMIT_S = 600.0
"""Each part of a check has its own, shorter limit; this one allows for a person who answers prompts."""


class Findings(BaseModel):
    """What the doctor found: facts by host, and problems, blocking ones first."""

    model_config = ConfigDict(frozen=True)

    cluster: str
    kind: str
    hosts: tuple[str, ...]
    """Names, in the order of cluster.yaml."""
    facts: dict[str, HostFacts] = Field(default_factory=dict)
    """Without the hosts that could not be checked."""
    problems: tuple[Problem, ...] = ()

    @property
    def blocking(self) -> tuple[Problem, ...]:
        """The problems that keep `up` from starting on a host."""
        return tuple(one for one in self.problems if one.level == "blocking")

    def of(self, host: str) -> tuple[Problem, ...]:
        """Return the problems of one host."""
        return tuple(one for one in self.problems if one.host == host)


async def examine(
    spec: ClusterSpec,
    *,
    on_host: Callable[[str, HostFacts | RaylaunchError], None] | None = None,
    on_prompt: OnPrompt | None = None,
    on_wait: OnWait | None = None,
    limit_s: float = LIMIT_S,
) -> Findings:
    """Probe all hosts of a cluster in parallel; for an embedded one this machine.

    Args:
        spec: the cluster.
        on_host: called with each host once it is probed, or its probe has failed.
        on_prompt: asks a person for passphrases, and about unknown host keys; None if nobody is there.
        on_wait: called every few seconds with what has not finished yet.
        limit_s: seconds for one host, including the connection and a person's answers.

    Raises:
        UntrustedError: nobody has accepted what the cluster connects to.
    """
    await check_accepted(spec, on_prompt=on_prompt)
    seen: dict[str, HostFacts | RaylaunchError] = {}
    hosts = hosts_to_check(spec)

    async def look(host: HostSpec) -> None:
        try:
            with anyio.fail_after(limit_s):
                async with _connected(spec, host, on_prompt, on_wait) as machine:
                    seen[host.name] = await probe(machine, host)
        except RaylaunchError as error:
            seen[host.name] = error
        except TimeoutError:
            seen[host.name] = _too_slow(host, limit_s)
        if on_host is not None:
            on_host(host.name, seen[host.name])

    async with anyio.create_task_group() as group:
        for host in hosts:
            group.start_soon(look, host)
    return Findings(
        cluster=spec.name,
        kind=spec.kind,
        hosts=tuple(host.name for host in hosts),
        facts={host.name: one for host in hosts if isinstance(one := seen[host.name], HostFacts)},
        problems=problems(spec, {host.name: seen[host.name] for host in hosts}),
    )


def _too_slow(host: HostSpec, limit_s: float) -> HostTimeoutError:
    msg = f"{host.name}: the check timed out after {limit_s:g} s"
    return HostTimeoutError(msg, hint="raylaunch doctor in a terminal waits longer", host=host.name, step="probe")


@contextlib.asynccontextmanager
async def _connected(
    spec: ClusterSpec, host: HostSpec, on_prompt: OnPrompt | None, on_wait: OnWait | None
) -> AsyncIterator[CommandRunner]:
    if spec.kind != "ssh":
        from raylaunch.cluster.commands import LocalHost  # noqa: PLC0415 -- either this or asyncssh is loaded

        yield LocalHost(host.name)
        return
    from raylaunch.cluster.probe.choices import target_of  # noqa: PLC0415
    from raylaunch.ssh.host import machine  # noqa: PLC0415 -- as above

    async with machine(target_of(host), limit_s=CONNECT_S, on_prompt=on_prompt, on_wait=on_wait) as connection:
        yield connection
