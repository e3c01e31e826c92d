"""Ray's Jobs API over HTTP. One of the few modules that know Ray; it translates Ray's errors.

It uses the REST interface directly instead of ``ray.job_submission``: that client sets no timeout, prefers
``RAY_ADDRESS`` to its own argument, and takes a second to import.
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
"""The label that Ray sets on each node."""

SUPERVISOR_LOST = "JOB_SUPERVISOR_ACTOR_"
"""Prefix of `RayJob.error_type` for a job whose supervisor was killed, or lost with its node."""

_TIMEOUT = httpx2.Timeout(20, connect=3)
_LOG_S = 600
_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_NOT_FOUND = 404


@dataclass(frozen=True)
class Submission:
    """One Ray submission."""

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
    """A submission as Ray reports it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: str = "SUBMISSION"
    submission_id: str | None = None
    job_id: str | None = None
    """Ray's id of its driver; None until the driver has connected."""
    status: str
    entrypoint: str = ""
    message: str | None = None
    start_time: Milliseconds | None = None
    end_time: Milliseconds | None = None
    metadata: dict[str, str] | None = None
    driver_exit_code: Annotated[int, Field(ge=-(1 << 31), lt=1 << 32)] | None = None
    driver_node_id: str | None = None
    """Where it is running or ran; None before it started."""
    error_type: str | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended according to Ray."""
        return self.status in _ENDED


class RayJobs:
    """The Jobs endpoint of one Ray cluster.

    Every method raises `ClusterDownError` if Ray does not respond within 20 s, or refuses the token.
    """

    def __init__(self, dashboard_url: str, token: str) -> None:
        self._http = httpx2.AsyncClient(
            base_url=dashboard_url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=_TIMEOUT,
            trust_env=False,
        )
        self._unreadable: set[str] = set()
        self._cached: tuple[bytes, list[RayJob]] = (b"[]", [])

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def version(self) -> str:
        """Return Ray's version; also a check that the Jobs endpoint responds."""
        async with self._requesting("version"):
            answer = await self._http.get("/api/version")
            answer.raise_for_status()
            return str(answer.json().get("ray_version", ""))

    async def submit(self, submission: Submission) -> None:
        """Submit. An existing submission counts as success: the id is the idempotency key.

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
        async with self._requesting(f"submit {submission.id}"):
            answer = await self._http.post("/api/jobs/", json=body)
        if answer.is_success or "already exists" in answer.text:
            return
        if answer.is_server_error and "No available agent" in answer.text:
            msg = f"Ray's agent for {submission.id} is not running yet"
            raise ClusterDownError(msg)
        msg = f"Ray refused {submission.id}: {_last_line(answer.text)}"
        raise ConflictError(msg)

    async def get(self, submission_id: str) -> RayJob | None:
        """Return a submission, or None if Ray knows none with this id."""
        async with self._requesting(f"get {submission_id}"):
            answer = await self._http.get(_path(submission_id))
            if answer.status_code == _NOT_FOUND:
                return None
            answer.raise_for_status()
            return RayJob.model_validate_json(answer.content)

    async def all(self) -> list[RayJob]:
        """Return all submissions that Ray knows, without drivers that were not submitted."""
        async with self._requesting("list jobs"):
            answer = await self._http.get("/api/jobs/")
            answer.raise_for_status()
            if answer.content != self._cached[0]:  # usually nothing has changed, and parsing hundreds of jobs is slow
                self._cached = (answer.content, list(self._readable(answer.json())))
        return list(self._cached[1])

    def _readable(self, items: object) -> Iterator[RayJob]:
        """Yield the submissions that can be read; each of the others is logged once."""
        if not isinstance(items, list):
            msg = "not a list"
            raise TypeError(msg)
        for item in items:
            try:
                job = RayJob.model_validate_json(json.dumps(item))  # which refuses lone surrogates too
            except ValidationError as error:
                name = str(item.get("submission_id") if isinstance(item, dict) else item)[:200]
                if name not in self._unreadable:
                    self._unreadable.add(name)
                    _log.warning("skipping a job of Ray that cannot be read: %r: %s", name, error)
                continue
            if job.type == "SUBMISSION" and job.submission_id:
                yield job

    async def stop(self, submission_id: str) -> None:
        """Ask Ray to stop it. A pending submission may still start, whatever Ray responds."""
        async with self._requesting(f"stop {submission_id}"):
            answer = await self._http.post(f"{_path(submission_id)}/stop")
            if answer.status_code != _NOT_FOUND:
                answer.raise_for_status()

    async def delete(self, submission_id: str) -> None:
        """Delete an ended submission from Ray, if it knows it."""
        async with self._requesting(f"delete {submission_id}"):
            answer = await self._http.delete(_path(submission_id))
            if answer.status_code != _NOT_FOUND:
                answer.raise_for_status()

    async def driver_log(self, submission_id: str, node_id: str, *, offset: int, limit: int) -> tuple[bytes, int]:
        """Return some bytes of a submission's log, and its size; empty and 0 if there is no log.

        Ray only offers tails, so the whole log is read, at 200 MB/s and in constant memory.
        """
        name = f"job-driver-{submission_id}.log"
        params: dict[str, str | int] = {"node_id": node_id, "filename": name, "lines": -1, "timeout": _LOG_S}
        data, size = bytearray(), 0
        async with (
            self._requesting(f"log of {submission_id}"),
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
    async def _requesting(self, what: str) -> AsyncIterator[None]:
        try:
            yield
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            msg = f"Ray's response cannot be read (request: {what}; {type(error).__name__})"
            raise ClusterDownError(msg, hint="check what is listening at the dashboard's address") from error
        except httpx2.HTTPStatusError as error:
            msg = (
                f"Ray responded with {error.response.status_code} (request: {what}): {_last_line(error.response.text)}"
            )
            raise ClusterDownError(msg) from error
        except httpx2.HTTPError as error:
            msg = f"Ray does not respond at {self._http.base_url} (request: {what}; {type(error).__name__})"
            raise ClusterDownError(msg, hint="raylaunch up") from error


def _path(submission_id: str) -> str:
    return f"/api/jobs/{quote(submission_id, safe='')}"


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else "(no text)"
