"""Look at all hosts of a cluster at once, and say what is wrong with them and what mends it. Nothing is changed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import anyio
from pydantic import BaseModel, ConfigDict, Field

from raylaunch.cluster.doctor.last_look import hosts_to_look_at
from raylaunch.cluster.doctor.problem import Problem
from raylaunch.cluster.doctor.problems import problems
from raylaunch.cluster.probe.facts import HostFacts
from raylaunch.cluster.probe.one_host import Runs, probe
from raylaunch.cluster.ssh.target import OnPrompt, OnWait
from raylaunch.cluster.trust import check_accepted
from raylaunch.errors import HostTimeoutError, RaylaunchError
from raylaunch.spec import ClusterSpec, HostSpec

CONNECT_S = 20.0
LIMIT_S = 600.0
"""Each part of a look has its own, shorter limit; this one is for a person who is asked."""


class Findings(BaseModel):
    """What the doctor found: facts by host, and problems, blocking ones first."""

    model_config = ConfigDict(frozen=True)

    cluster: str
    kind: str
    hosts: tuple[str, ...]
    """Names, in the order of cluster.yaml."""
    facts: dict[str, HostFacts] = Field(default_factory=dict)
    """Without the hosts that could not be looked at."""
    problems: tuple[Problem, ...] = ()

    @property
    def blocking(self) -> tuple[Problem, ...]:
        """The problems that keep `up` from beginning on a host."""
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
    """Probe all hosts of a cluster in parallel; of an embedded one this machine.

    Args:
        spec: the cluster.
        on_host: told each host when it is probed, or when that failed.
        on_prompt: asks a person for passphrases, and about unknown host keys; None where nobody is there.
        on_wait: told every few seconds what has not ended yet.
        limit_s: seconds for one host, the way there included; a person's answers too.

    Raises:
        UntrustedError: nobody has accepted what the cluster connects to.
    """
    await check_accepted(spec, on_prompt=on_prompt)
    seen: dict[str, HostFacts | RaylaunchError] = {}
    hosts = hosts_to_look_at(spec)

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
    msg = f"{host.name}: was not looked at within {limit_s:g} s"
    return HostTimeoutError(msg, hint="raylaunch doctor in a terminal waits longer", host=host.name, step="probe")


@contextlib.asynccontextmanager
async def _connected(
    spec: ClusterSpec, host: HostSpec, on_prompt: OnPrompt | None, on_wait: OnWait | None
) -> AsyncIterator[Runs]:
    if spec.kind != "ssh":
        from raylaunch.cluster.this_machine import ThisMachine  # noqa: PLC0415 -- either this or asyncssh is loaded

        yield ThisMachine(host.name)
        return
    from raylaunch.cluster.ssh.machine import machine  # noqa: PLC0415 -- as above
    from raylaunch.cluster.targets import target_of  # noqa: PLC0415

    async with machine(target_of(host), limit_s=CONNECT_S, on_prompt=on_prompt, on_wait=on_wait) as connection:
        yield connection
