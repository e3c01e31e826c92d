"""Small jobs with which `up` verifies a cluster, submitted, followed and deleted through its controller."""

from __future__ import annotations

import secrets
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from raylaunch.cluster.local.health import HttpAnswer, http_request
from raylaunch.errors import ClusterError, RaylaunchError, from_wire
from raylaunch.models.fields import Environment
from raylaunch.models.job import JobView, SubmitAnswer, SubmitRequest
from raylaunch.models.job_spec import JobSpec, Resources, Tracking, Where

_NAME = "raylaunch-probe"
_ASK_S = 30.0
_LINES = 20

_Model = TypeVar("_Model", bound=BaseModel)


class ProbeJobs:
    """The requests to the controller.

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
            name=_NAME,
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
        await http_request(
            self._port, f"/v1/jobs/{job}/stop", token=self._token, method="POST", body=b"{}", limit_s=_ASK_S
        )

    async def delete(self, job: str) -> None:
        """Delete the job with all its files."""
        await http_request(self._port, f"/v1/jobs/{job}", token=self._token, method="DELETE", limit_s=_ASK_S)

    async def last_lines(self, job: str) -> str:
        """Return the end of its log; empty if that is unavailable."""
        path = f"/v1/jobs/{job}/logs?tail={_LINES}"
        answer = await http_request(self._port, path, token=self._token, limit_s=_ASK_S)
        return answer.body.decode(errors="replace") if answer.ok else ""

    async def _request(
        self, model: type[_Model], path: str, *, method: str = "GET", body: bytes | None = None
    ) -> _Model:
        answer = await http_request(self._port, path, token=self._token, method=method, body=body, limit_s=_ASK_S)
        if answer.ok:
            try:
                return model.model_validate_json(answer.body)
            except ValidationError as error:
                msg = f"invalid response of the controller to {path}: {error}"
                raise ClusterError(msg) from None
        raise _refused(answer, path)


def _refused(answer: HttpAnswer, path: str) -> RaylaunchError:
    said = answer.json()
    error = said.get("error") if isinstance(said, dict) else None
    if isinstance(error, dict):
        return from_wire(str(error.get("code")), str(error.get("message")), str(error.get("hint", "")))
    return ClusterError(f"the controller did not answer {path}: {answer.why or f'HTTP {answer.status}'}")
