"""Ray's Jobs API over HTTP. One of the few modules that know Ray, and it translates its errors.

It speaks the REST interface itself instead of using ``ray.job_submission``: that client sets no time limit, obeys
``RAY_ADDRESS`` over its own argument, and costs a second to import.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raylaunch.errors import ClusterDownError, ConflictError

_log = logging.getLogger(__name__)

NODE_LABEL = "ray.io/node-id"
"""The label that Ray gives each node itself."""

SUPERVISOR_LOST = "JOB_SUPERVISOR_ACTOR_"
"""How Ray's `RayJob.error_type` begins for a job whose supervisor was killed, or lost with its node."""

_TIMEOUT = httpx2.Timeout(20, connect=3)
_LOG_S = 600
_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_NOT_FOUND = 404


@dataclass(frozen=True)
class Submission:
    """One Ray submission. Times in Ray are milliseconds; here nothing is a time."""

    id: str
    entrypoint: str
    node_id: str
    gpus: float = 0
    cpus: float = 0
    memory: int = 0
    custom: dict[str, float] = field(default_factory=dict)
    env_vars: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


Milliseconds = Annotated[int, Field(ge=0, le=253_402_300_799_000)]
"""Since the epoch, up to the year 9999."""


class RayJob(BaseModel):
    """What Ray remembers of a submission."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: str = "SUBMISSION"
    submission_id: str | None = None
    job_id: str | None = None
    """Ray's own id of its driver; None while that has not connected."""
    status: str
    entrypoint: str = ""
    message: str | None = None
    start_time: Milliseconds | None = None
    end_time: Milliseconds | None = None
    metadata: dict[str, str] | None = None
    driver_exit_code: Annotated[int, Field(ge=-(1 << 31), lt=1 << 32)] | None = None
    driver_node_id: str | None = None
    """Where it runs or ran; None before it began."""
    error_type: str | None = None

    @property
    def ended(self) -> bool:
        """Whether Ray counts it as over."""
        return self.status in _ENDED


class RayJobs:
    """The Jobs endpoint of one Ray cluster.

    Every method raises `ClusterDownError` when Ray does not answer within 20 s, or refuses the token.
    """

    def __init__(self, dashboard_url: str, token: str) -> None:
        self._http = httpx2.AsyncClient(
            base_url=dashboard_url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=_TIMEOUT,
            trust_env=False,
        )
        self._unreadable: set[str] = set()
        self._all: tuple[bytes, list[RayJob]] = (b"[]", [])

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def version(self) -> str:
        """Return Ray's version; also the question whether the Jobs endpoint answers."""
        async with self._asking("its version"):
            answer = await self._http.get("/api/version")
            answer.raise_for_status()
            return str(answer.json().get("ray_version", ""))

    async def submit(self, submission: Submission) -> None:
        """Submit; that it exists already is success: the id is the idempotency key.

        Raises:
            ConflictError: Ray refused the submission; the text is Ray's own.
        """
        body = {
            "entrypoint": submission.entrypoint,
            "submission_id": submission.id,
            "runtime_env": {"env_vars": submission.env_vars},
            "metadata": submission.metadata,
            "entrypoint_num_gpus": submission.gpus or None,
            "entrypoint_num_cpus": submission.cpus or None,
            "entrypoint_memory": submission.memory or None,
            "entrypoint_resources": submission.custom or None,
            "entrypoint_label_selector": {NODE_LABEL: submission.node_id},
        }
        async with self._asking(f"to run {submission.id}"):
            answer = await self._http.post("/api/jobs/", json=body)
        if answer.is_success or "already exists" in answer.text:
            return
        if answer.is_server_error and "No available agent" in answer.text:
            msg = f"Ray has no agent yet to run {submission.id}"
            raise ClusterDownError(msg)
        msg = f"Ray refused {submission.id}: {_last_line(answer.text)}"
        raise ConflictError(msg)

    async def get(self, submission_id: str) -> RayJob | None:
        """Return what Ray remembers, or None when it knows no such submission."""
        async with self._asking(f"about {submission_id}"):
            answer = await self._http.get(_of(submission_id))
            if answer.status_code == _NOT_FOUND:
                return None
            answer.raise_for_status()
            return RayJob.model_validate_json(answer.content)

    async def all(self) -> list[RayJob]:
        """Return all submissions that Ray remembers; drivers that were not submitted are left out."""
        async with self._asking("for its jobs"):
            answer = await self._http.get("/api/jobs/")
            answer.raise_for_status()
            if answer.content != self._all[0]:  # mostly nothing has changed, and reading hundreds of jobs takes a while
                self._all = (answer.content, list(self._readable(answer.json())))
        return list(self._all[1])

    def _readable(self, told: object) -> Iterator[RayJob]:
        """Yield the submissions that can be read; the others are logged once each, and hide none."""
        if not isinstance(told, list):
            msg = "not a list"
            raise TypeError(msg)
        for item in told:
            try:
                job = RayJob.model_validate_json(json.dumps(item))  # which refuses half characters too
            except ValidationError as error:
                named = str(item.get("submission_id") if isinstance(item, dict) else item)[:200]
                if named not in self._unreadable:
                    self._unreadable.add(named)
                    _log.warning("a job of Ray cannot be read and is left out: %r: %s", named, error)
                continue
            if job.type == "SUBMISSION" and job.submission_id:
                yield job

    async def stop(self, submission_id: str) -> None:
        """Ask Ray to stop it. For a submission that still waits, Ray's answer is no promise: it may yet start."""
        async with self._asking(f"to stop {submission_id}"):
            answer = await self._http.post(f"{_of(submission_id)}/stop")
            if answer.status_code != _NOT_FOUND:
                answer.raise_for_status()

    async def delete(self, submission_id: str) -> None:
        """Let Ray forget an ended submission; one that it does not know is forgotten already."""
        async with self._asking(f"to forget {submission_id}"):
            answer = await self._http.delete(_of(submission_id))
            if answer.status_code != _NOT_FOUND:
                answer.raise_for_status()

    async def driver_log(self, submission_id: str, node_id: str, *, offset: int, limit: int) -> tuple[bytes, int]:
        """Return some bytes of a submission's log, and the size of all; with nothing and 0 when there is no log.

        Ray knows tails only, so the whole log is read, 200 MB a second; memory stays flat.
        """
        name = f"job-driver-{submission_id}.log"
        params: dict[str, str | int] = {"node_id": node_id, "filename": name, "lines": -1, "timeout": _LOG_S}
        data, size = bytearray(), 0
        async with (
            self._asking(f"for the log of {submission_id}"),
            self._http.stream("GET", "/api/v0/logs/file", params=params) as answer,
        ):
            if answer.is_error and b"file is not found" in await answer.aread():
                return b"", 0
            answer.raise_for_status()
            async for block in answer.aiter_raw():
                data += block[max(0, offset - size) :][: limit - len(data)]
                size += len(block)
        return bytes(data), size

    @contextlib.asynccontextmanager
    async def _asking(self, what: str) -> AsyncIterator[None]:
        try:
            yield
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            msg = f"Ray answered with something that cannot be read when asked {what} ({type(error).__name__})"
            raise ClusterDownError(msg, hint="look at what listens there") from error
        except httpx2.HTTPStatusError as error:
            msg = f"Ray answered {error.response.status_code} when asked {what}: {_last_line(error.response.text)}"
            raise ClusterDownError(msg) from error
        except httpx2.HTTPError as error:
            msg = f"Ray does not answer at {self._http.base_url} when asked {what} ({type(error).__name__})"
            raise ClusterDownError(msg, hint="raylaunch up") from error


def _of(submission_id: str) -> str:
    return f"/api/jobs/{quote(submission_id, safe='')}"


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else "(no text)"
