"""The verification of a cluster: every node is listed with its GPUs, runs a job, and reaches the others."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel, ValidationError

from raylaunch.cluster.hosts.allreduce import MARK, STEP, AllReducePlan, explain, plan_allreduce, success
from raylaunch.cluster.hosts.host_program import HostState
from raylaunch.cluster.local.controller_process import controller_status
from raylaunch.cluster.local.health import HttpAnswer, http_request
from raylaunch.cluster.types import Step
from raylaunch.errors import ClusterError, ClusterStartError, RaylaunchError, from_wire
from raylaunch.models.cluster import ControllerStatus, NodeView
from raylaunch.models.fields import Environment
from raylaunch.models.job import JobView, SubmitAnswer, SubmitRequest
from raylaunch.models.job_spec import JobSpec, Resources, Tracking, Where
from raylaunch.models.states import JobState

NODES_S = 180.0
PROBE_JOB_S = 120.0
NETWORK_S = 240.0
_TURN_S = 45.0
"""How long the network check waits for GPUs, which were free a moment ago."""
_POLL_S, _REMOVE_S, _RELEASE_S, _REQUEST_S = 0.2, 15.0, 5.0, 30.0
_LINES = 20
_QUEUED = frozenset({JobState.HELD, JobState.QUEUED})
_COMMAND = 'echo "$(hostname): GPU ${CUDA_VISIBLE_DEVICES:-none}"'


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
        status = await controller_status(self._port, self._token)
        free = {} if isinstance(status, str) else {node.hostname: node.gpus_free for node in status.nodes if node.alive}
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
            self._on_step(Step(STEP, "note", words))
            self.unproved |= set(plan.left_out)
        if len(plan.members) == 1:
            self.unproved.add(plan.members[0].host)
        elif plan.members:
            await self._check_network(plan)

    async def wait_released(self) -> None:
        """Wait until the GPUs of the test jobs are listed as free: Ray updates them with a delay."""
        with anyio.move_on_after(_RELEASE_S):
            while still_held(self._free, await controller_status(self._port, self._token)):  # noqa: ASYNC110 -- over HTTP
                await anyio.sleep(_POLL_S)

    async def _plan_network(self, hosts: set[str]) -> AllReducePlan | None:
        """Wait briefly for GPUs: Ray lists those that a job has just released with a delay."""
        well = {host: state for host, state in self._states.items() if host not in self.errors}
        until = time.monotonic() + _RELEASE_S
        while True:
            status = await controller_status(self._port, self._token)
            plan = plan_allreduce(well, () if isinstance(status, str) else status.nodes, hosts)
            if plan is None or not plan.left_out or time.monotonic() > until:
                return plan
            await anyio.sleep(_POLL_S)

    async def _check_network(self, plan: AllReducePlan) -> None:
        """Run a job on each member of the plan; the outcome is reported as a step or as errors."""
        self._on_step(
            Step(STEP, "begins", f"checking the network between {', '.join(one.host for one in plan.members)}")
        )
        began = time.monotonic()
        seen: list[JobView] = []
        try:
            for rank, member in enumerate(plan.members):
                seen.append(await self._jobs.submit(member.host, plan.entrypoint(rank), gpus=1, timeout_s=NETWORK_S))
            seen = await self._until_ended(seen, began)
            queued = [member.host for member, job in zip(plan.members, seen, strict=True) if job.state in _QUEUED]
            if queued:
                words = f"not checked: no GPU became free on {', '.join(queued)}; the next up retries"
                self._on_step(Step(STEP, "note", words))
                self.unproved |= {one.host for one in plan.members}
                return
            ends = [_network_result(job, await self._jobs.last_lines(job.id)) for job in seen]
            if found := explain(plan.members, ends):
                self.errors |= found
            else:
                self._on_step(Step(STEP, "done", success(plan.members, ends), time.monotonic() - began))
        except RaylaunchError as error:
            msg = f"the network could not be checked: {error.message}"
            self.errors[plan.members[0].host] = ClusterError(msg, hint=error.hint)
        finally:
            with anyio.CancelScope(shield=True), contextlib.suppress(RaylaunchError):
                await self._remove([one.id for one in seen])

    async def _until_ended(self, seen: list[JobView], began: float) -> list[JobView]:
        """Wait until all have ended, or one does not start or end in time."""
        while not all(one.state.ended for one in seen):
            took = time.monotonic() - began
            if took > NETWORK_S or (took > _TURN_S and any(one.state in _QUEUED for one in seen)):
                return seen
            await anyio.sleep(_POLL_S)
            seen = [one if one.state.ended else await self._jobs.get(one.id) for one in seen]
        return seen

    async def _remove(self, jobs: list[str]) -> None:
        for job in jobs:
            await self._jobs.stop(job)
        with anyio.move_on_after(_REMOVE_S):
            while jobs:
                await anyio.sleep(_POLL_S)
                ended = [job for job in jobs if (await self._jobs.get(job)).state.ended]
                for job in ended:
                    await self._jobs.delete(job)
                jobs = [job for job in jobs if job not in ended]

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
        seen = await self._jobs.submit(host, _COMMAND, gpus=gpus, timeout_s=PROBE_JOB_S)
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


def _network_result(job: JobView, printed: str) -> dict[str, Any]:
    """Return a member's result, or a substitute from the job's state."""
    _, mark, line = printed.rpartition(MARK)
    try:
        said = json.loads(line.splitlines()[0]) if mark else None
    except (ValueError, IndexError, RecursionError):
        said = None
    if isinstance(said, dict) and "kind" in said:
        return said
    why = job.message or f"its job is {job.state.value}"
    return {"kind": "job", "why": f"{why} (raylaunch show {job.id})"}


def still_held(before: Mapping[str, float], status: ControllerStatus | str) -> tuple[str, ...]:
    """Return the hosts with fewer free GPUs than `before`. Pure."""
    nodes = () if isinstance(status, str) else status.nodes
    return tuple(node.hostname for node in nodes if node.alive and node.gpus_free < before.get(node.hostname, 0))


def unready(states: Mapping[str, HostState], status: ControllerStatus | str) -> dict[str, str]:
    """Return by host why a node is not as expected; empty if all are. Pure."""
    if isinstance(status, str):
        return dict.fromkeys(states, f"the controller does not answer: {status}")
    nodes = {node.hostname: node for node in status.nodes if node.alive}
    found = {host: _wrong(nodes.get(host), state) for host, state in states.items()}
    return {host: f"{host} {why}" for host, why in found.items() if why}


def _wrong(node: NodeView | None, state: HostState) -> str:
    if node is None:
        return "is not listed by Ray"
    if node.gpus != state.gpus:
        return f"has {node.gpus:g} GPUs in Ray, and should have {state.gpus}"
    return "" if node.steward else "has no node agent that answers"


_Model = TypeVar("_Model", bound=BaseModel)


class ProbeJobs:
    """Small jobs on single hosts, submitted, followed and deleted through the controller.

    Args:
        port: of the controller, on loopback here.
        token: the client's.
        environment: of the jobs.
    """

    def __init__(self, port: int, token: str, environment: Environment) -> None:
        self._port = port
        self._token = token
        self._environment = environment

    async def submit(self, host: str, entrypoint: str, *, gpus: int, timeout_s: float) -> JobView:
        """Submit a job for one host, with the highest priority."""
        job = JobSpec(
            name="raylaunch-probe",
            entrypoint=entrypoint,
            working_dir="",
            environment=self._environment,
            resources=Resources(gpus=gpus, cpus=0),
            where=Where(hosts=(host,)),
            tracking=Tracking(mode="disabled"),
            priority=100,
            timeout_s=timeout_s,
        )
        request = SubmitRequest(spec=job, request_id=secrets.token_hex(8))
        body = request.model_dump_json().encode()
        return (await self._request(SubmitAnswer, "/v1/jobs", method="POST", body=body)).job

    async def get(self, job: str) -> JobView:
        """Return the job's current state."""
        return await self._request(JobView, f"/v1/jobs/{job}")

    async def stop(self, job: str) -> None:
        """Stop the job if it has not ended."""
        await self._send(f"/v1/jobs/{job}/stop", method="POST", body=b"{}")

    async def delete(self, job: str) -> None:
        """Delete the job with all its files."""
        await self._send(f"/v1/jobs/{job}", method="DELETE")

    async def last_lines(self, job: str) -> str:
        """Return the end of its log; empty if that is unavailable."""
        answer = await self._send(f"/v1/jobs/{job}/logs?tail={_LINES}")
        return answer.body.decode(errors="replace") if answer.ok else ""

    async def _send(self, path: str, *, method: str = "GET", body: bytes | None = None) -> HttpAnswer:
        return await http_request(self._port, path, token=self._token, method=method, body=body, limit_s=_REQUEST_S)

    async def _request(
        self, model: type[_Model], path: str, *, method: str = "GET", body: bytes | None = None
    ) -> _Model:
        answer = await self._send(path, method=method, body=body)
        if answer.ok:
            try:
                return model.model_validate_json(answer.body)
            except ValidationError as invalid:
                msg = f"invalid response of the controller to {path}: {invalid}"
                raise ClusterError(msg) from None
        said = answer.json()
        error = said.get("error") if isinstance(said, dict) else None
        if isinstance(error, dict):
            raise from_wire(str(error.get("code")), str(error.get("message")), str(error.get("hint", "")))
        msg = f"the controller did not answer {path}: {answer.why or f'HTTP {answer.status}'}"
        raise ClusterError(msg)
