"""From hosts with only sshd to a working cluster: connect, probe, install and start, each host independently.

A host that fails does not stop the others; its error is kept by its name, and the next `up` continues from there.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio

from raylaunch.cluster.client_record import HeadProgram
from raylaunch.cluster.doctor.checks_cluster import problems
from raylaunch.cluster.doctor.problem import Problem
from raylaunch.cluster.hosts.host_calls import call_host
from raylaunch.cluster.hosts.host_program import HeadUpRequest, HostState, JoinRequest
from raylaunch.cluster.install.environment import ensure_beside, ensure_environment
from raylaunch.cluster.install.platforms import HostPython
from raylaunch.cluster.install.wheel_store import WheelStore
from raylaunch.cluster.probe import choices
from raylaunch.cluster.probe.choices import addresses_of, place_of, root_of, target_of, with_chosen_gpus
from raylaunch.cluster.probe.facts import HostFacts
from raylaunch.cluster.probe.probe import probe
from raylaunch.cluster.types import Step
from raylaunch.errors import ClusterError, ClusterStartError, RaylaunchError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec
from raylaunch.ssh.host import SSHHost, machine
from raylaunch.ssh.target import OnPrompt, PendingStep
from raylaunch.version import __version__

CONNECT_S = 20.0
CLIENT = "(client)"
"""This machine, among the names of hosts."""
_QUIET_S = 4.0

_OF_PYTHON = frozenset({"python_missing", "python_differs", "environment_missing"})


@dataclass
class BootstrapOutcome:
    """The state of each host, by its name."""

    facts: dict[str, HostFacts] = field(default_factory=dict)
    programs: dict[str, HeadProgram] = field(default_factory=dict)
    states: dict[str, HostState] = field(default_factory=dict)
    errors: dict[str, RaylaunchError] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    """Problems found by the probes, blocking ones first."""
    warnings: tuple[Problem, ...] = ()
    fresh: set[str] = field(default_factory=set)
    """Hosts on which something was started by this call."""
    actions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What would be done on each host; filled by `plan`."""
    keeps: dict[str, tuple[str, ...]] = field(default_factory=dict)


def choose_pythons(
    hosts: Sequence[HostSpec], facts: Mapping[str, HostFacts], found: Sequence[Problem]
) -> dict[str, HostPython]:
    """Return by host the Python for its environment. Pure.

    A host with an unsuitable Python is ignored: the others come up without it.

    Raises:
        ClusterStartError: the others have none in common.
    """
    out = {one.host for one in found if one.level == "blocking" and one.code in _OF_PYTHON}
    agree = {host.name: host for host in hosts if host.name in facts and host.name not in out}
    made = {name: facts[name] for name, host in agree.items() if not host.environment}
    named = {
        one.minor for name in agree if name not in made for one in facts[name].pythons if one.named and one.version
    }
    return choices.choose_pythons(made, named=named)


class Bootstrap:
    """One bring-up of a cluster of hosts.

    Args:
        spec: the cluster.
        on_step: called with each step of each host; its name starts with the host's.
        on_prompt: asks a person; None if nobody is there.
        on_start: called right before something may be started on a host, with the program that can end it.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        on_step: Callable[[Step], None],
        *,
        on_prompt: OnPrompt | None = None,
        on_start: Callable[[HostSpec, HeadProgram], None] = lambda _host, _program: None,
    ) -> None:
        self._spec = spec
        self._hosts = spec.host_specs()
        self._head = self._hosts[0]
        self._on_step = on_step
        self._prompt = on_prompt
        self._on_start = on_start
        self._store = WheelStore()
        self._left = len(self._hosts)
        self._all_probed = anyio.Event()
        self._head_settled = anyio.Event()
        self._pythons: Mapping[str, HostPython] = {}
        self._no_python: ClusterStartError | None = None
        self._reported_at: dict[str, float] = {}
        self.outcome = BootstrapOutcome()

    async def run(self) -> BootstrapOutcome:
        """Bring up every host that can be brought up; errors are in the outcome, by host."""
        return await self._all(self._bring_up)

    async def plan(self) -> BootstrapOutcome:
        """Probe every host and return what `run` would do, without changing anything."""
        return await self._all(self._foresee)

    async def _all(self, then: Callable[[HostSpec, SSHHost], Awaitable[None]]) -> BootstrapOutcome:
        async with anyio.create_task_group() as group:
            for host in self._hosts:
                group.start_soon(self._host, host, then)
        return self.outcome

    async def _host(self, host: HostSpec, then: Callable[[HostSpec, SSHHost], Awaitable[None]]) -> None:
        """Connect to one host, probe it, and continue when all are probed."""
        counted = False
        try:
            async with machine(
                target_of(host), limit_s=CONNECT_S, on_prompt=self._prompt, on_wait=self._waits
            ) as connection:
                began = time.monotonic()
                self.outcome.facts[host.name] = await probe(connection, host)
                took = time.monotonic() - began
                self._on_step(Step(f"{host.name}: probe", "done", "checked hardware and software", took))
                counted = True
                self._count_probed()
                await self._all_probed.wait()
                self._refuse_blocking(host)
                await then(host, connection)
        except RaylaunchError as error:
            self.outcome.errors[host.name] = error
            self._on_step(Step(host.name, "note", error.message.removeprefix(f"{host.name}: ")))
        finally:
            if not counted:
                self._count_probed()
            if host is self._head:
                self._head_settled.set()

    async def _bring_up(self, host: HostSpec, connection: SSHHost) -> None:
        program = await self._install(host, connection)
        self.outcome.programs[host.name] = program
        self._on_start(host, program)
        self.outcome.states[host.name] = await self._start(host, connection, program)

    async def _foresee(self, host: HostSpec, _connection: SSHHost) -> None:
        facts = self.outcome.facts[host.name]
        runs = any(one.name == self._spec.name and one.wanted == "running" for one in facts.clusters)
        if runs:
            self.outcome.keeps[host.name] = ("its part of the cluster, if it is healthy",)
            return
        self.outcome.actions[host.name] = (self._how_installed(host, facts), self._how_started(host, facts))

    def _how_installed(self, host: HostSpec, facts: HostFacts) -> str:
        if host.environment:
            return f"raylaunch {__version__} next to {host.environment}"
        if self._no_python is not None:
            raise self._no_python
        python = self._pythons[host.name]
        source = "from its package index" if facts.index.reachable else "from pushed wheels"
        made = f"raylaunch {__version__}, Ray and wandb in {root_of(host, facts)}/versions"
        return f"{made}, with Python {python.platform.python} ({python.path}), {source}"

    def _how_started(self, host: HostSpec, facts: HostFacts) -> str:
        place = place_of(self._spec, host, facts)
        what = "Ray's head and the controller" if host is self._head else f"Ray, joining {self._head.name}"
        found = len(facts.gpus.gpus)
        gpus = host.gpus if isinstance(host.gpus, int) else found if host.gpus == "auto" else len(host.gpus)
        return f"{what}, with {gpus} {'GPU' if gpus == 1 else 'GPUs'}, on {place.ray_address}"

    def _count_probed(self) -> None:
        """Once every host is probed, or its probe has failed, check all of them together."""
        self._left -= 1
        if self._left:
            return
        found = problems(self._spec, {**self.outcome.facts, **self.outcome.errors})
        self.outcome.problems = found
        self.outcome.warnings = tuple(one for one in found if one.level == "warning")
        try:
            self._pythons = choose_pythons(self._hosts, self.outcome.facts, found)
        except ClusterStartError as error:
            self._no_python = error
        self._all_probed.set()

    def _refuse_blocking(self, host: HostSpec) -> None:
        found = [one for one in self.outcome.problems if one.level == "blocking" and one.host == host.name]
        if found:
            first, *others = found
            more = "".join(f"\n    {one.message}" for one in others)
            msg = f"{host.name}: {first.message}{more}"
            raise ClusterStartError(msg, hint=first.mend, step="probe")

    async def _install(self, host: HostSpec, connection: SSHHost) -> HeadProgram:
        """Install this raylaunch, Ray and wandb on the host."""
        facts = self.outcome.facts[host.name]
        root = root_of(host, facts)
        report = self._of_host(host)
        if host.environment:
            named = next(one.path for one in facts.pythons if one.named)  # as the probe has found it
            python = await ensure_beside(connection, named, store=self._store, root=root, on_step=report)
        elif self._no_python is not None:
            raise self._no_python
        else:
            python = await ensure_environment(
                connection,
                self._pythons[host.name],
                store=self._store,
                index_reachable=bool(facts.index.reachable),
                root=root,
                on_step=report,
            )
        return HeadProgram(python=python, root=root)

    async def _start(self, host: HostSpec, connection: SSHHost, program: HeadProgram) -> HostState:
        """Start the host's part of the cluster: the head's immediately, a worker's once the head is up."""
        facts = self.outcome.facts[host.name]
        spec, place = self._spec.part_of(with_chosen_gpus(self._spec, host, facts)), place_of(self._spec, host, facts)
        report = self._of_host(host)
        if host is self._head:
            request = HeadUpRequest(spec=spec, place=place, members=self._members())
            return await call_host(connection, program, request, HostState, on_step=report)
        await self._head_settled.wait()
        head = self.outcome.states.get(self._head.name)
        if head is None:
            msg = f"{host.name}: not started, because the head {self._head.name} did not come up"
            raise ClusterError(msg, hint=f"fix {self._head.name}, then run raylaunch up again")
        place = place.model_copy(update={"head": f"{head.place.ray_address}:{head.ports['gcs']}"})
        join = JoinRequest(
            spec=spec,
            place=place,
            cluster_id=head.cluster_id,
            ray_token=head.ray_token,
            certificate=head.certificates.get(host.name),
        )
        return await call_host(connection, program, join, HostState, on_step=report)

    def _members(self) -> dict[str, tuple[str, ...]]:
        """Return addresses by certificate: every worker that was probed, and this machine for Ray's own tools."""
        workers = [host for host in self._hosts if host is not self._head and host.name in self.outcome.facts]
        return {CLIENT: (), **{host.name: addresses_of(self.outcome.facts[host.name]) for host in workers}}

    def _of_host(self, host: HostSpec) -> Callable[[Step], None]:
        def report(step: Step) -> None:
            self._reported_at[host.name] = time.monotonic()
            if step.name in {"ray", "controller"} and step.state in {"begins", "done"}:
                self.outcome.fresh.add(host.name)
            self._on_step(Step(f"{host.name}: {step.name}", step.state, step.message, step.seconds))

        return report

    def _waits(self, wait: PendingStep) -> None:
        """Report a step that takes long, unless the steps within it have just reported more."""
        if time.monotonic() - self._reported_at.get(wait.host, 0.0) > _QUIET_S:
            so_far = f"{wait.waited_s:.0f} s so far, at most {wait.limit_s:.0f} s"
            self._on_step(Step(f"{wait.host}: {wait.step}", "waits", so_far, wait.waited_s))
