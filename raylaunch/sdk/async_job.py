"""A job, asynchronously. `Job`, the blocking form, is generated from this module."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raylaunch.client.client import Client
from raylaunch.client.downloads import Downloaded
from raylaunch.client.environment_choice import active_python, import_hint
from raylaunch.client.transport import OnProgress
from raylaunch.errors import JobFailedError, NotYoursError, RaylaunchError
from raylaunch.models.job import Artifact, Event, JobView, LogMatches
from raylaunch.models.safe_text import clean
from raylaunch.models.states import JobState
from raylaunch.sdk.dataframe import LineReader
from raylaunch.sdk.display import Card, Metrics, job_line, loss_key, sentence

if TYPE_CHECKING:
    import pandas as pd

_CURVES = 20
_POINTS = 500
_EVIDENCE_LINES = 20


def no_progress(_what: str, _done: int, _total: int, /) -> None:
    """Show nothing."""


class AsyncJob:
    """One job. `AsyncCluster.submit` and `AsyncCluster.job` make it.

    It holds nothing that could be lost: end this process during any verb, and the job keeps running.

    All verbs raise `ClusterDownError` when nothing answers, `AccessError` when the token may not do it, and
    `NotFoundError` when the job was removed, or for the metrics and files of a job submitted with plain Ray.
    """

    def __init__(self, client: Client, view: JobView, *, asked: str = "") -> None:
        self._client = client
        self._view = view
        self._asked = asked if client.is_others(view.id) else ""

    def _refuse_others(self) -> None:
        """Refuse to change the job, or to download its files, if a name led to somebody else's."""
        if self._asked not in {"", self.id}:
            raise NotYoursError.of(self._asked, job=self.id, owner=self._view.owner)

    @property
    def id(self) -> str:
        """The job's id. It never changes."""
        return self._view.id

    @property
    def name(self) -> str:
        """The job's name."""
        return self._view.name

    @property
    def view(self) -> JobView:
        """The last known state of the job; `status` updates it."""
        return self._view

    def __repr__(self) -> str:
        return job_line(self._view).replace("<Job", "<AsyncJob", 1)

    def _repr_html_(self) -> str:
        return Card(self._view, note="last known state; await job.card() updates it")._repr_html_()

    async def status(self) -> JobView:
        """Return the job's current state, with all details."""
        self._view = await self._client.job(self.id)
        return self._view

    async def wait(self, *, timeout_s: float | None = None) -> JobView:
        """Return the job when it has ended, however it ended.

        Ctrl-C ends the waiting; the job keeps running.

        Args:
            timeout_s: seconds to wait at most; by default without limit.

        Raises:
            TimeoutError: it has not ended within `timeout_s`.
        """
        try:
            self._view = await asyncio.wait_for(self._client.wait(self.id), timeout_s)
        except asyncio.TimeoutError:
            msg = f"{self.id} has not ended within {timeout_s or 0:g} s; it is still {self._view.state.value}"
            raise TimeoutError(msg) from None
        return self._view

    async def result(self, *, timeout_s: float | None = None) -> tuple[Artifact, ...]:
        """Return the job's outputs when it has succeeded: names, bytes and checksums. `download` fetches them.

        Args:
            timeout_s: seconds to wait at most; by default without limit.

        Raises:
            JobFailedError: it ended otherwise; the message holds its last lines.
            TimeoutError: it has not ended within `timeout_s`.
        """
        job = await self.wait(timeout_s=timeout_s)
        if job.state is not JobState.SUCCEEDED:
            raise _failure(job)
        if job.foreign:
            return ()
        return tuple(file for file in await self.files() if file.kind == "output")

    async def stop(self, *, grace_s: float | None = None) -> JobView:
        """Request that the job stops. It is `stopped` only when all its processes have exited, so `wait` for that.

        Args:
            grace_s: seconds between SIGTERM and SIGKILL; by default the value in the job's spec.

        Returns:
            The job once the request is recorded: `stopping`, or `stopped` if it was still waiting.

        Raises:
            ConflictError: it has ended.
            NotYoursError: it was found by a name that none of your jobs has.
        """
        self._refuse_others()
        self._view = await self._client.stop(self.id, grace_s=grace_s)
        return self._view

    async def remove(self) -> int:
        """Delete the job, which must have ended, with all its files in the cluster; return how many bytes they had.

        Raises:
            ConflictError: it has not ended.
            NotYoursError: as for `stop`.
        """
        self._refuse_others()
        return await self._client.remove(self.id)

    async def events(self, *, after: int = 0) -> tuple[Event, ...]:
        """Return what has happened to the job so far, oldest first.

        Args:
            after: the `seq` of an event; only later ones are returned.
        """
        found: list[Event] = []
        while (page := await self._client.events(self.id, after=after)).events:
            found += page.events
            after = page.cursor
        return tuple(found)

    async def follow(self, *, after: int = 0) -> AsyncGenerator[Event, None]:
        """Yield what has happened to the job and what happens next, until it has ended.

        Args:
            after: the `seq` of an event; only later ones are yielded.
        """
        async for event in self._client.follow(self.id, after=after):
            yield event

    async def logs(self, *, tail: int | None = 1000, attempt: int | None = None, rank: int = 0) -> str:
        """Return the log's last lines, as text; what is not UTF-8 is replaced.

        Args:
            tail: lines; None for the whole log, which is then held in memory.
            attempt: which attempt, from 1; by default the latest.
            rank: which of the attempt's ranks; `view.attempt.ranks` says how many there are.

        Raises:
            NotFoundError: there is no such attempt, or no such rank in it.
        """
        chunk = await self._client.logs(
            self.id, tail=tail, offset=0 if tail is None else None, attempt=attempt, rank=rank
        )
        parts = [chunk.data]
        while chunk.data and chunk.next_offset < chunk.size:
            chunk = await self._client.logs(self.id, offset=chunk.next_offset, attempt=chunk.attempt, rank=rank)
            parts.append(chunk.data)
        return b"".join(parts).decode("utf-8", "replace")

    async def follow_logs(
        self, *, tail: int | None = None, attempt: int | None = None, rank: int = 0
    ) -> AsyncGenerator[str, None]:
        """Yield the log's lines, without their ends, as they are written, until the job has ended.

        A line of more than 64 KiB comes in pieces.

        Args:
            tail: start with this many last lines; by default with the first line.
            attempt: only this attempt; by default the latest and those that follow it.
            rank: which of the attempt's ranks; `view.attempt.ranks` says how many there are.
        """
        lines, current = LineReader(), 0
        async for chunk in self._client.follow_logs(self.id, tail=tail, attempt=attempt, rank=rank):
            if chunk.attempt != current:
                for line in lines.finish():
                    yield line
            current = chunk.attempt
            for line in lines.feed(chunk.data):
                yield line
        for line in lines.finish():
            yield line

    async def search_logs(
        self, pattern: str, *, regex: bool = False, ignore_case: bool = False, limit: int = 100
    ) -> LogMatches:
        """Return the lines of the latest attempt's log that match a pattern, each with its offset in bytes.

        Args:
            pattern: text, or with `regex` a regular expression in RE2's syntax.
            regex: whether `pattern` is a regular expression.
            ignore_case: whether upper and lower case are the same.
            limit: lines at most, 1 or more.

        Raises:
            SpecError: `pattern` is not a valid regular expression, or empty.
        """
        return await self._client.search_logs(self.id, pattern, regex=regex, ignore_case=ignore_case, limit=limit)

    async def metrics(self, keys: Sequence[str] = (), *, max_points: int = 500) -> Metrics:
        """Return the job's metrics: last values, and curves. A notebook draws them.

        Args:
            keys: the metrics whose curves are returned; by default all, 20 at most.
            max_points: points of a curve at most, 2 or more; longer ones are thinned evenly.
        """
        page = await self._client.metrics(self.id, keys=keys, max_points=max_points)
        if not keys and page.keys:
            page = await self._client.metrics(self.id, keys=page.keys[:_CURVES], max_points=max_points)
        return Metrics(page)

    async def metrics_frame(self, keys: Sequence[str] = ()) -> pd.DataFrame:
        """Return every point as a pandas table: one row per step, one column per metric.

        Args:
            keys: the metrics to return; by default all.

        Raises:
            RaylaunchError: pandas is not installed.
        """
        from raylaunch.sdk.dataframe import frame_of_csv  # noqa: PLC0415 -- pandas is optional

        return frame_of_csv(b"".join([data async for data in self._client.metrics_csv(self.id, keys=keys)]))

    async def files(self) -> tuple[Artifact, ...]:
        """Return the files that the job has produced so far: outputs, checkpoints, logs, tracking, records."""
        return await self._client.files(self.id)

    async def download(
        self,
        paths: Sequence[str] | str = (),
        *,
        to: Path | str,
        everything: bool = False,
        replace: bool = False,
        on_progress: OnProgress = no_progress,
    ) -> tuple[Downloaded, ...]:
        """Fetch files, each verified against its checksum.

        A file that is there already is not fetched again. One that differs is kept, unless it came from an earlier
        download of this job; the other files are still fetched.

        Args:
            paths: names, folders or globs; by default the job's outputs, each from the latest attempt that has it.
            to: the folder for them; it is created.
            everything: without `paths`, checkpoints, logs, tracking and records too.
            replace: whether files that differ are replaced, also in a folder that holds another job's files.
            on_progress: called with what is transferred, bytes done and bytes in total.

        Returns:
            What is here now, one entry per file.

        Raises:
            ConflictError: the folder holds another job's files.
            NotYoursError: as for `stop`.
            IncompleteDownloadError: some files are not here, such as those that were kept; its `done` has the others.
            NotFoundError: a name matches no file.
            StorageError: a file cannot be written here.
        """
        self._refuse_others()
        wanted = (paths,) if isinstance(paths, str) else tuple(paths)
        return await self._client.download(
            self.id, wanted, dest=Path(to), everything=everything, replace=replace, on_progress=on_progress
        )

    async def card(self) -> Card:
        """Return the job as a notebook shows it: state, progress, last metrics, and its loss curve."""
        job = await self.status()
        key = loss_key(tuple(job.last_metrics))
        if not key:
            return Card(job)
        try:
            page = await self._client.metrics(job.id, keys=[key], max_points=_POINTS)
        except RaylaunchError as error:
            return Card(job, note=error.message)
        return Card(job, curve=next(iter(page.series), None))


def _whose(job: JobView) -> str:
    rank = job.attempt.failed_rank if job.attempt else None
    return f"rank {rank}'s" if rank else "its"


def _failure(job: JobView) -> JobFailedError:
    """Return how a job ended as an error: why, its last lines, and the next call."""
    tail = tuple(clean(line, colour=False) for line in job.log_tail[-_EVIDENCE_LINES:])
    why = f"{job.id} {job.state.value.replace('_', ' ')}" + (f": {sentence(job)}" if sentence(job) else "")
    lines = [why, *([f"{_whose(job)} last lines:"] if tail else []), *(f"  | {line}" for line in tail)]
    more = "print(job.logs()) shows more of its log, job.events() what happened to it"
    hint = import_hint(job, active_python(os.environ, prefix=sys.prefix)) or more
    return JobFailedError(
        "\n".join(lines),
        hint=hint,
        job=job.id,
        state=job.state.value,
        exit_code=job.attempt.exit_code if job.attempt else None,
        log_tail=tail,
    )
