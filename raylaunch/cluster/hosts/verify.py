"""The verification of a cluster: every node is listed with its GPUs, runs a job, and reaches the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import anyio

from raylaunch.cluster.hosts.allreduce import AllReduceCheck, AllReducePlan, plan_allreduce
from raylaunch.cluster.hosts.host_program import HostState
from raylaunch.cluster.hosts.probe_jobs import ProbeJobs
from raylaunch.cluster.local.controller_process import controller_status
from raylaunch.cluster.types import Step
from raylaunch.errors import ClusterError, ClusterStartError, RaylaunchError
from raylaunch.models.cluster import ControllerStatus, NodeView
from raylaunch.models.fields import Environment
from raylaunch.models.states import JobState

NODES_S = 180.0
PROBE_JOB_S = 120.0
_POLL_S = 0.2
_LET_GO_S = 5.0
_WORDS = 'echo "$(hostname): GPU ${CUDA_VISIBLE_DEVICES:-none}"'


class ClusterVerifier:
    """Verifies a cluster through its controller.

    Args:
        port: of the controller, on loopback here.
        token: the client's.
        environment: of the cluster's jobs.
        states: what each host reported once it was up, by its name.
        on_step: called with each step.
    """

    def __init__(
        self,
        port: int,
        token: str,
        environment: Environment,
        states: Mapping[str, HostState],
        *,
        on_step: Callable[[Step], None],
    ) -> None:
        self._port = port
        self._token = token
        self._states = states
        self._on_step = on_step
        # They need no environment that is built on nodes from packages or a job's code; any other may have PyTorch.
        made = environment.kind in {"pip", "uv"}
        self._jobs = ProbeJobs(port, token, Environment(kind="ray") if made else environment)
        self.errors: dict[str, RaylaunchError] = {}
        """Errors by host."""
        self.unproved: set[str] = set()
        """Hosts with a check that could not be run now."""
        self._free: dict[str, float] = {}

    async def nodes(self) -> None:
        """Wait until the controller lists every host as expected."""
        began, reported = time.monotonic(), ""
        wrong: Mapping[str, str] = {}
        with anyio.move_on_after(NODES_S):
            while wrong := unready(self._states, await controller_status(self._port, self._token)):
                pending = "; ".join(dict.fromkeys(wrong.values()))
                if pending != reported:
                    self._on_step(Step("nodes", "begins", f"waiting: {pending}"))
                    reported = pending
                await anyio.sleep(_POLL_S)
        for host, why in wrong.items():
            msg = f"{why}, {NODES_S:.0f} s after its Ray was started"
            hint = f"see {host}: .raylaunch/clusters/*/ray.log"
            self.errors[host] = ClusterStartError(msg, hint=hint, step="nodes")
        if not wrong:
            words = f"{len(self._states)} alive, each with its GPUs"
            self._on_step(Step("nodes", "done", words, time.monotonic() - began))

    async def jobs(self, hosts: set[str]) -> None:
        """Run a job on each of `hosts`, with one of its GPUs if one is free."""
        says = await controller_status(self._port, self._token)
        free = {} if isinstance(says, str) else {node.hostname: node.gpus_free for node in says.nodes if node.alive}
        self._free = free
        async with anyio.create_task_group() as group:
            for host in sorted(hosts - self.errors.keys()):
                group.start_soon(partial(self._job, host, gpus=int(min(1, free.get(host, 0)))))

    async def network(self, hosts: set[str]) -> None:
        """Check the network between the hosts with GPUs, if one of them is among `hosts`."""
        plan = await self._plan_network(hosts)
        if plan is None:
            return
        if plan.left_out:
            words = f"not checked with {', '.join(plan.left_out)}: no GPU is free there now; the next up retries"
            self._on_step(Step("network", "note", words))
            self.unproved |= set(plan.left_out)
        if len(plan.members) == 1:
            self.unproved.add(plan.members[0].host)
        elif plan.members:
            together = AllReduceCheck(self._jobs, plan, on_step=self._on_step)
            self.errors |= await together.run()
            self.unproved |= together.unproved

    async def wait_released(self) -> None:
        """Wait until the GPUs of the test jobs are listed as free: Ray updates them with a delay."""
        with anyio.move_on_after(_LET_GO_S):
            while still_held(self._free, await controller_status(self._port, self._token)):  # noqa: ASYNC110 -- over HTTP
                await anyio.sleep(_POLL_S)

    async def _plan_network(self, hosts: set[str]) -> AllReducePlan | None:
        """Wait briefly for GPUs: Ray lists those that a job has just released with a delay."""
        well = {host: state for host, state in self._states.items() if host not in self.errors}
        until = time.monotonic() + _LET_GO_S
        while True:
            says = await controller_status(self._port, self._token)
            plan = plan_allreduce(well, () if isinstance(says, str) else says.nodes, hosts)
            if plan is None or not plan.left_out or time.monotonic() > until:
                return plan
            await anyio.sleep(_POLL_S)

    async def _job(self, host: str, *, gpus: int) -> None:
        began = time.monotonic()
        self._on_step(Step(f"{host}: job", "begins", "running a test job"))
        try:
            await self._run(host, gpus=gpus)
        except RaylaunchError as error:
            self.errors[host] = error
        else:
            busy = ", without a GPU: all are in use" if self._states[host].gpus and not gpus else ""
            self._on_step(Step(f"{host}: job", "done", f"test job succeeded{busy}", time.monotonic() - began))

    async def _run(self, host: str, *, gpus: int) -> None:
        seen = await self._jobs.submit(host, _WORDS, gpus=gpus, timeout_s=PROBE_JOB_S)
        with anyio.move_on_after(PROBE_JOB_S):
            while not seen.state.ended:
                await anyio.sleep(_POLL_S)
                seen = await self._jobs.get(seen.id)
        if not seen.state.ended:
            await self._jobs.stop(seen.id)
            msg = f"{host}: the test job did not end within {PROBE_JOB_S:.0f} s: {seen.message or seen.state.value}"
            raise ClusterError(msg, hint=f"raylaunch show {seen.id}; raylaunch logs {seen.id}")
        if seen.state is not JobState.SUCCEEDED:
            msg = f"{host}: the test job ended as {seen.state.value}: {seen.message}"
            raise ClusterStartError(msg, hint=f"raylaunch show {seen.id}; raylaunch logs {seen.id}", step="job")
        await self._jobs.delete(seen.id)


def still_held(before: Mapping[str, float], says: ControllerStatus | str) -> tuple[str, ...]:
    """Return the hosts with fewer free GPUs than `before`. Pure."""
    nodes = () if isinstance(says, str) else says.nodes
    return tuple(node.hostname for node in nodes if node.alive and node.gpus_free < before.get(node.hostname, 0))


def unready(states: Mapping[str, HostState], says: ControllerStatus | str) -> dict[str, str]:
    """Return by host why a node is not as expected; empty if all are. Pure."""
    if isinstance(says, str):
        return dict.fromkeys(states, f"the controller does not answer: {says}")
    nodes = {node.hostname: node for node in says.nodes if node.alive}
    found = {host: _wrong(nodes.get(host), state) for host, state in states.items()}
    return {host: f"{host} {why}" for host, why in found.items() if why}


def _wrong(node: NodeView | None, state: HostState) -> str:
    if node is None:
        return "is not listed by Ray"
    if node.gpus != state.gpus:
        return f"has {node.gpus:g} GPUs in Ray, and should have {state.gpus}"
    return "" if node.steward else "has no node agent that answers"
