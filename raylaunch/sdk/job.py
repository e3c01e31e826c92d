"""A job, blocking: each verb is that of `AsyncJob`, also inside a notebook's running loop.

Generated from async_job.py: change that, then run `make docs-reference`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raylaunch.client.downloads import Downloaded
from raylaunch.client.transport import OnProgress
from raylaunch.errors import RaylaunchError
from raylaunch.models.job import Artifact, Event, JobView, LogMatches
from raylaunch.sdk.async_job import AsyncJob, no_progress
from raylaunch.sdk.display import Card, Metrics
from raylaunch.sdk.loop import LoopThread

if TYPE_CHECKING:
    import pandas as pd

_DISPLAY_S = 3.0


class Job:
    """One job. `Cluster.submit` and `Cluster.job` make it.

    It holds nothing that could be lost: end this process during any verb, and the job keeps running.

    All verbs raise `ClusterDownError` when nothing answers, `AccessError` when the token may not do it, and
    `NotFoundError` when the job was removed, or for the metrics and files of a job submitted with plain Ray.
    """

    def __init__(self, asynchronous: AsyncJob, loop: LoopThread) -> None:
        self._async = asynchronous
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._async).replace("<AsyncJob", "<Job", 1)

    def _repr_html_(self) -> str:
        try:
            card = self._loop.run(asyncio.wait_for(self._async.card(), _DISPLAY_S))
        except (RaylaunchError, asyncio.TimeoutError):
            card = Card(self._async.view, note="last known state: the cluster does not respond")
        return card._repr_html_()

    @property
    def id(self) -> str:
        """The job's id. It never changes."""
        return self._async.id

    @property
    def name(self) -> str:
        """The job's name."""
        return self._async.name

    @property
    def view(self) -> JobView:
        """The last known state of the job; `status` updates it."""
        return self._async.view

    def status(self) -> JobView:
        """Return the job's current state, with all details."""
        return self._loop.run(self._async.status())

    def wait(self, *, timeout_s: float | None = None) -> JobView:
        """Return the job when it has ended, however it ended.

        Ctrl-C ends the waiting; the job keeps running.

        Args:
            timeout_s: seconds to wait at most; by default without limit.

        Raises:
            TimeoutError: it has not ended within `timeout_s`.
        """
        return self._loop.run(self._async.wait(timeout_s=timeout_s))

    def result(self, *, timeout_s: float | None = None) -> tuple[Artifact, ...]:
        """Return the job's outputs when it has succeeded: names, bytes and checksums. `download` fetches them.

        Args:
            timeout_s: seconds to wait at most; by default without limit.

        Raises:
            JobFailedError: it ended otherwise; the message holds its last lines.
            TimeoutError: it has not ended within `timeout_s`.
        """
        return self._loop.run(self._async.result(timeout_s=timeout_s))

    def stop(self, *, grace_s: float | None = None) -> JobView:
        """Request that the job stops. It is `stopped` only when all its processes have exited, so `wait` for that.

        Args:
            grace_s: seconds between SIGTERM and SIGKILL; by default the value in the job's spec.

        Returns:
            The job once the request is recorded: `stopping`, or `stopped` if it was still waiting.

        Raises:
            ConflictError: it has ended.
            NotYoursError: it was found by a name that none of your jobs has.
        """
        return self._loop.run(self._async.stop(grace_s=grace_s))

    def remove(self) -> int:
        """Delete the job, which must have ended, with all its files in the cluster; return how many bytes they had.

        Raises:
            ConflictError: it has not ended.
            NotYoursError: as for `stop`.
        """
        return self._loop.run(self._async.remove())

    def events(self, *, after: int = 0) -> tuple[Event, ...]:
        """Return what has happened to the job so far, oldest first.

        Args:
            after: the `seq` of an event; only later ones are returned.
        """
        return self._loop.run(self._async.events(after=after))

    def follow(self, *, after: int = 0) -> Generator[Event, None, None]:
        """Yield what has happened to the job and what happens next, until it has ended.

        Args:
            after: the `seq` of an event; only later ones are yielded.
        """
        return self._loop.each(self._async.follow(after=after))

    def logs(self, *, tail: int | None = 1000, attempt: int | None = None, rank: int = 0) -> str:
        """Return the log's last lines, as text; what is not UTF-8 is replaced.

        Args:
            tail: lines; None for the whole log, which is then held in memory.
            attempt: which attempt, from 1; by default the latest.
            rank: which of the attempt's ranks; `view.attempt.ranks` says how many there are.

        Raises:
            NotFoundError: there is no such attempt, or no such rank in it.
        """
        return self._loop.run(self._async.logs(tail=tail, attempt=attempt, rank=rank))

    def follow_logs(
        self, *, tail: int | None = None, attempt: int | None = None, rank: int = 0
    ) -> Generator[str, None, None]:
        """Yield the log's lines, without their ends, as they are written, until the job has ended.

        A line of more than 64 KiB comes in pieces.

        Args:
            tail: start with this many last lines; by default with the first line.
            attempt: only this attempt; by default the latest and those that follow it.
            rank: which of the attempt's ranks; `view.attempt.ranks` says how many there are.
        """
        return self._loop.each(self._async.follow_logs(tail=tail, attempt=attempt, rank=rank))

    def search_logs(
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
        return self._loop.run(self._async.search_logs(pattern, regex=regex, ignore_case=ignore_case, limit=limit))

    def metrics(self, keys: Sequence[str] = (), *, max_points: int = 500) -> Metrics:
        """Return the job's metrics: last values, and curves. A notebook draws them.

        Args:
            keys: the metrics whose curves are returned; by default all, 20 at most.
            max_points: points of a curve at most, 2 or more; longer ones are thinned evenly.
        """
        return self._loop.run(self._async.metrics(keys, max_points=max_points))

    def metrics_frame(self, keys: Sequence[str] = ()) -> pd.DataFrame:
        """Return every point as a pandas table: one row per step, one column per metric.

        Args:
            keys: the metrics to return; by default all.

        Raises:
            RaylaunchError: pandas is not installed.
        """
        return self._loop.run(self._async.metrics_frame(keys))

    def files(self) -> tuple[Artifact, ...]:
        """Return the files that the job has produced so far: outputs, checkpoints, logs, tracking, records."""
        return self._loop.run(self._async.files())

    def download(
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
        return self._loop.run(
            self._async.download(paths, to=to, everything=everything, replace=replace, on_progress=on_progress)
        )

    def card(self) -> Card:
        """Return the job as a notebook shows it: state, progress, last metrics, and its loss curve."""
        return self._loop.run(self._async.card())
