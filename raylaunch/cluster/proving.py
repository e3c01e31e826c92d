"""The proof that a cluster works: every node is alive with the GPUs it should have, and a job has run on each."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import anyio
from pydantic import BaseModel, ValidationError

from raylaunch.cluster.answer import Answer, ask
from raylaunch.cluster.controller_program import controller_status
from raylaunch.cluster.on_host import HostState
from raylaunch.cluster.plan import Step
from raylaunch.errors import ClusterError, ClusterStartError, RaylaunchError, from_wire
from raylaunch.spec import JobSpec, Resources, Tracking, Where
from raylaunch.state import ControllerStatus, JobState, JobView, NodeView, SubmitAnswer, SubmitRequest

NODES_S = 180.0
PROBE_JOB_S = 120.0
_POLL_S = 0.2
_PROBE = "raylaunch-probe"
_WORDS = 'echo "$(hostname): GPU ${CUDA_VISIBLE_DEVICES:-none}"'

_Model = TypeVar("_Model", bound=BaseModel)


class Proof:
    """Looks at a cluster through its controller.

    Args:
        port: of the controller, on loopback here.
        token: the client's.
        states: what each host said once it was up, by its name.
        on_step: told what is waited for.
    """

    def __init__(
        self, port: int, token: str, states: Mapping[str, HostState], *, on_step: Callable[[Step], None]
    ) -> None:
        self._port = port
        self._token = token
        self._states = states
        self._tell = on_step
        self.errors: dict[str, RaylaunchError] = {}
        """What is not so, by host."""

    async def nodes(self) -> None:
        """Wait until the controller sees every host as it should be."""
        began, said = time.monotonic(), ""
        wrong: Mapping[str, str] = {}
        with anyio.move_on_after(NODES_S):
            while wrong := unready(self._states, await controller_status(self._port, self._token)):
                words = "; ".join(dict.fromkeys(wrong.values()))
                if words != said:
                    self._tell(Step("nodes", "begins", f"waits: {words}"))
                    said = words
                await anyio.sleep(_POLL_S)
        for host, why in wrong.items():
            msg = f"{why}, {NODES_S:.0f} s after its Ray was started"
            hint = f"see {host}: .raylaunch/clusters/*/ray.log"
            self.errors[host] = ClusterStartError(msg, hint=hint, step="nodes")
        if not wrong:
            words = f"{len(self._states)} alive, each with its GPUs"
            self._tell(Step("nodes", "done", words, time.monotonic() - began))

    async def jobs(self, hosts: set[str]) -> None:
        """Run a job on each of `hosts`, holding one of its GPUs if it has any; on a busy one its turn may not come."""
        async with anyio.create_task_group() as group:
            for host in sorted(hosts - self.errors.keys()):
                group.start_soon(partial(self._job, host))

    async def _job(self, host: str) -> None:
        began = time.monotonic()
        self._tell(Step(f"{host}: job", "begins", "runs a job there"))
        try:
            await self._run(host)
        except RaylaunchError as error:
            self.errors[host] = error
        else:
            self._tell(Step(f"{host}: job", "done", "a job ran there", time.monotonic() - began))

    async def _run(self, host: str) -> None:
        job = JobSpec(
            name=_PROBE,
            entrypoint=_WORDS,
            working_dir="",
            resources=Resources(gpus=min(1, self._states[host].gpus), cpus=0),
            where=Where(hosts=(host,)),
            tracking=Tracking(mode="disabled"),
            priority=100,
            timeout_s=PROBE_JOB_S,
        )
        request = SubmitRequest(spec=job, request_id=secrets.token_hex(8))
        body = request.model_dump_json().encode()
        seen = (await self._ask(SubmitAnswer, "/v1/jobs", method="POST", body=body)).job
        with anyio.move_on_after(PROBE_JOB_S):
            while not seen.state.ended:
                await anyio.sleep(_POLL_S)
                seen = await self._ask(JobView, f"/v1/jobs/{seen.id}")
        if not seen.state.ended:
            await self._ask(JobView, f"/v1/jobs/{seen.id}/stop", method="POST", body=b"{}")
            msg = f"{host}: a job there did not end within {PROBE_JOB_S:.0f} s: {seen.message or seen.state.value}"
            raise ClusterError(msg, hint=f"raylaunch show {seen.id}; raylaunch logs {seen.id}")
        if seen.state is not JobState.SUCCEEDED:
            msg = f"{host}: a job there ended as {seen.state.value}: {seen.message}"
            raise ClusterStartError(msg, hint=f"raylaunch show {seen.id}; raylaunch logs {seen.id}", step="job")
        await ask(self._port, f"/v1/jobs/{seen.id}", token=self._token, method="DELETE", limit_s=30)

    async def _ask(self, model: type[_Model], path: str, *, method: str = "GET", body: bytes | None = None) -> _Model:
        answer = await ask(self._port, path, token=self._token, method=method, body=body, limit_s=30)
        if answer.ok:
            try:
                return model.model_validate_json(answer.body)
            except ValidationError as error:
                msg = f"the controller's answer to {path} is not understood: {error}"
                raise ClusterError(msg) from None
        raise _refused(answer, path)


def _refused(answer: Answer, path: str) -> RaylaunchError:
    said = answer.json()
    error = said.get("error") if isinstance(said, dict) else None
    if isinstance(error, dict):
        return from_wire(str(error.get("code")), str(error.get("message")), str(error.get("hint", "")))
    return ClusterError(f"the controller did not answer {path}: {answer.why or f'HTTP {answer.status}'}")


def unready(states: Mapping[str, HostState], says: ControllerStatus | str) -> dict[str, str]:
    """Return by host why a node is not as it should be; empty when all are. Pure."""
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
    return "" if node.steward else "has no steward that answers"
