"""The asynchronous client of a cluster, over HTTP. The CLI, the SDK and the MCP server are built on it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from typing_extensions import Self, TypedDict

from raylaunch.client import downloads
from raylaunch.client.admin import Admin
from raylaunch.client.downloads import Downloaded
from raylaunch.client.logs import LogChunk, LogPosition, follow_log, read_chunk
from raylaunch.client.sensitive import NO_MORE, Allowances
from raylaunch.client.transport import OnProgress, Params, Reconnect, Transport, allow_upload, no_progress, page_from
from raylaunch.cluster.types import Endpoint
from raylaunch.errors import whose
from raylaunch.files import Directory
from raylaunch.models.cluster import ControllerStatus, RayAccess
from raylaunch.models.fields import Count, Environment
from raylaunch.models.job import (
    Artifact,
    DryRun,
    Event,
    EventPage,
    JobPage,
    JobView,
    LogMatches,
    MetricsPage,
    PackReport,
    SubmitAnswer,
    UsagePage,
    WheelSet,
)
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import JobState

if TYPE_CHECKING:
    from raylaunch.client.packing import Packed
    from raylaunch.client.submission import Submitter


_Result = TypeVar("_Result")

HOLD_S = 25.0
"""How long one long poll is held open."""
_REFRESH_S = 300.0
_NAMED = 3
PATIENCE_S = 60.0
"""How long calls are retried while the controller is down: it restarts in a few seconds."""


class _Freed(TypedDict):
    bytes: Count


def _ignore(_sentence: str) -> None:
    pass


class Client:
    """One cluster. An async context manager.

    ::

        async with Client(endpoint) as client:
            answer = await client.submit(JobSpec(entrypoint="python train.py"))
            job = await client.wait(answer.job.id)

    `ref` is a job's id, its name (your latest job of that name), or ``last``. Methods that only read use somebody
    else's job if you have none of that name, and `on_notice` reports whose it is; `stop`, `remove` and `download`
    raise `NotYoursError`. All methods raise `ClusterDownError` if there is no response, `AccessError` if the token
    lacks the permission, and `NotFoundError` if there is no such job.

    Args:
        endpoint: the address of the controller, and the token.
        cluster: its name, for messages.
        patience_s: for how long following, waiting, submitting and transfers are retried while the controller is down.
        on_notice: called when the connection is lost, when it is back, and when a name means somebody else's job.
        restart: called while there is no response, at most every few seconds; returns the address to continue with.
        replace_hung: called if the controller accepts connections and does not respond; returns the address of its
            replacement.
        over_ssh: whether the cluster's head is reached over SSH: large files then use several connections.
        here: whether the cluster is on this machine, so that jobs may use the environment that is active here.
        prefix: `sys.prefix` if the interpreter is the person's own, for example in a notebook.
        environment: the environment of jobs in the cluster.yaml on this machine; packages that the cluster lists are
            resolved here only if it is the same.
    """

    def __init__(  # noqa: PLR0913 -- all keywords, each with a sentence
        self,
        endpoint: Endpoint,
        *,
        cluster: str = "local",
        patience_s: float = PATIENCE_S,
        on_notice: Callable[[str], None] = _ignore,
        restart: Callable[[], Awaitable[Endpoint]] | None = None,
        replace_hung: Callable[[], Awaitable[Endpoint]] | None = None,
        over_ssh: bool = False,
        here: bool = False,
        prefix: str = "",
        environment: Environment | None = None,
    ) -> None:
        self._environment = environment
        self._ssh_cluster = cluster if over_ssh else ""
        self._transport = Transport(
            endpoint, cluster=cluster, replace_hung=replace_hung, on_others_job=self._report_owner
        )
        self._others: set[str] = set()
        self._notice = on_notice
        self._here, self._prefix = here, prefix
        self.admin = Admin(self._transport)
        self._reconnect = Reconnect(self._transport, limit_s=patience_s, on_notice=on_notice, restart=restart)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._transport.__aexit__()

    def _report_owner(self, job: str, owner: str) -> None:
        if job not in self._others:
            self._others.add(job)
            self._notice(f"you have no job of that name; this is {job}, {whose(owner)}")

    def is_others(self, job_id: str) -> bool:
        """Return whether a job was requested by a name that none of your own jobs has."""
        return job_id in self._others

    async def retrying(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """Retry a call that may be repeated while there is no response, for at most `patience_s`."""
        return await self._reconnect.call(call)

    # --- the cluster

    async def status(self) -> ControllerStatus:
        """Return the state of the controller, Ray and the nodes."""
        return await self._transport.read(ControllerStatus, "GET", "/v1/status")

    async def usage(self) -> UsagePage:
        """Return the sizes of what the store contains, largest first."""
        return await self._transport.read(UsagePage, "GET", "/v1/usage")

    async def ray_access(self) -> RayAccess:
        """Return what Ray's own tools need to reach the cluster."""
        return await self._transport.read(RayAccess, "GET", "/v1/ray")

    async def secrets_list(self) -> tuple[str, ...]:
        """Return the names of the secrets that are set."""
        return await self._transport.read(tuple[str, ...], "GET", "/v1/secrets")

    async def secrets_set(self, name: str, value: str, *, people: Sequence[str] | None = None) -> None:
        """Set a secret; jobs that name it get it as an environment variable.

        Args:
            name: its name.
            value: its value.
            people: whose jobs may have it; empty for everybody's. None does not change it; the default is everybody's.
        """
        body: dict[str, object] = {"value": value} if people is None else {"value": value, "people": list(people)}
        await self._transport.request("PUT", f"/v1/secrets/{quote(name, safe='')}", body=body)

    async def secrets_remove(self, name: str) -> None:
        """Remove a secret."""
        await self._transport.request("DELETE", f"/v1/secrets/{quote(name, safe='')}")

    # --- jobs

    async def submit(  # noqa: PLR0913 -- what to run, and callbacks
        self,
        spec: JobSpec,
        *,
        request_id: str = "",
        secrets: Mapping[str, str] | None = None,
        allow: Allowances = NO_MORE,
        packed: Packed | None = None,
        on_packed: Callable[[PackReport, int], None] | None = None,
        on_upload: Callable[[int], Awaitable[None]] = allow_upload,
        on_progress: OnProgress = no_progress,
    ) -> SubmitAnswer:
        """Pack the working directory, send what the cluster does not have, and submit.

        Args:
            spec: what to run.
            request_id: the same id with the same spec and code returns the same job. By default a random one, so that
                a submission whose response was lost is repeated safely.
            secrets: values for this job only, by the name of their environment variable.
            allow: files and sizes that are refused otherwise (`raylaunch.client.sensitive`).
            packed: its code, if `raylaunch.client.submission.checked` has packed it already; closed at the end.
            on_packed: called with the report and the size of the archive.
            on_upload: called with the number of bytes to send, before the first; it may raise.
            on_progress: called with the progress of the upload.

        Raises:
            SpecError: the working directory cannot be packed, or the cluster could never run this.
            WithheldError: files in the working directory look like secrets, or the upload is larger than allowed.
            ConflictError: `request_id` was used for something else.
        """
        return await self._submitter().submit(
            spec,
            request_id=request_id,
            secrets=secrets,
            allow=allow,
            packed=packed,
            on_packed=on_packed,
            on_upload=on_upload,
            on_progress=on_progress,
        )

    async def dry_run(
        self, spec: JobSpec, *, secrets: Mapping[str, str] | None = None, allow: Allowances = NO_MORE
    ) -> DryRun:
        """Return what `submit` would send and where the job could run; send nothing. Checks and raises as `submit`."""
        return await self._submitter().dry_run(spec, secrets=secrets, allow=allow)

    async def send_environment(self, *, on_progress: OnProgress = no_progress) -> tuple[WheelSet, ...]:
        """Send the wheels of the packages that cluster.yaml lists, for nodes without an index; return what was sent."""
        return await self._submitter().send_environment(on_progress=on_progress)

    def _submitter(self) -> Submitter:
        from raylaunch.client.submission import Submitter  # noqa: PLC0415 -- only a submission reads ignore files and git

        return Submitter(
            self._transport,
            retry=self.retrying,
            on_notice=self._notice,
            here=self._here,
            prefix=self._prefix,
            environment=self._environment,
        )

    async def jobs(  # noqa: PLR0913 -- each is one filter
        self,
        *,
        states: Sequence[JobState] = (),
        name: str = "",
        owner: str = "",
        tag: str = "",
        since: float | None = None,
        limit: int = 50,
        cursor: str = "",
    ) -> JobPage:
        """Return one page of jobs, newest first. `since` is a time in seconds since the epoch."""
        params: Params = {
            "state": ",".join(state.value for state in states),
            "name": name,
            "owner": owner,
            "tag": tag,
            "since": since,
            "limit": limit,
            "cursor": cursor,
        }
        page = page_from((await self._transport.request("GET", "/v1/jobs", params=params)).body)
        if page.unreadable:
            left_out = ", ".join(page.unreadable[:_NAMED]) + (" and others" if len(page.unreadable) > _NAMED else "")
            count = len(page.unreadable)
            self._notice(f"skipped {count} {'job' if count == 1 else 'jobs'} that cannot be read: {left_out}")
        return page

    async def job(self, ref: str) -> JobView:
        """Return one job with everything about it."""
        return await self._transport.read(JobView, "GET", _of(ref))

    async def own_job(self, ref: str) -> JobView:
        """Return one job as `job` does, and somebody else's by its id alone.

        Raises:
            NotYoursError: `ref` is a name, and you have no job of that name.
        """
        return await self._transport.read(JobView, "GET", _of(ref), params={"own": "true"})

    async def stop(self, ref: str, *, grace_s: float | None = None) -> JobView:
        """Ask a job to stop; it is `stopped` once all of its processes have exited, so `wait` for that.

        Raises:
            NotYoursError: as `own_job`.
        """
        return await self._transport.read(JobView, "POST", _of(ref, "stop"), body={"grace_s": grace_s})

    async def remove(self, ref: str) -> int:
        """Delete an ended job with all of its files, and return how many bytes this freed.

        Raises:
            ConflictError: the job has not ended.
            NotYoursError: as `own_job`.
        """
        return (await self._transport.read(_Freed, "DELETE", _of(ref)))["bytes"]

    # --- events

    async def events(self, ref: str, *, after: int = 0, wait_s: float = 0.0) -> EventPage:
        """Return a job's events after a cursor; with `wait_s`, wait until there is one."""
        params = {"after": after, "wait_s": wait_s}
        return await self._transport.read(EventPage, "GET", _of(ref, "events"), params=params, wait_s=wait_s)

    async def follow(self, ref: str, *, after: int = 0) -> AsyncIterator[Event]:
        """Yield a job's events after a cursor as they happen, until the job has ended."""
        job = await self.retrying(lambda: self.job(ref))
        cursor, ended = after, job.state.ended
        while True:
            page = await self._news(job.id, cursor, 0.0 if ended else HOLD_S)
            for event in page.events:
                yield event
            cursor = max(cursor, page.cursor)
            if page.events:
                ended = ended or any(event.state is not None and event.state.ended for event in page.events)
            elif ended:
                return
            else:
                ended = (await self.retrying(lambda: self.job(job.id))).state.ended

    async def wait(self, ref: str) -> JobView:
        """Wait until the job has ended, and return it."""
        job = await self.retrying(lambda: self.job(ref))
        looked = time.monotonic()
        while not job.state.ended:
            asked = time.monotonic()
            news = await self._news(job.id, job.cursor, HOLD_S)
            now = time.monotonic()
            # Each change of state is an event, and reading a running job reads all of its metrics. So it is read when
            # there are events, when the controller shuts down and responds early, and every few minutes.
            if news.events or now - asked < HOLD_S / 2 or now - looked > _REFRESH_S:
                job, looked = await self.retrying(lambda: self.job(job.id)), now  # noqa: B023 -- called before the next turn
        return job

    async def _news(self, job_id: str, after: int, wait_s: float) -> EventPage:
        return await self.retrying(lambda: self.events(job_id, after=after, wait_s=wait_s))

    # --- logs, metrics and files

    async def logs(  # noqa: PLR0913 -- each is a part of the position
        self,
        ref: str,
        *,
        attempt: int | None = None,
        rank: int = 0,
        tail: int | None = None,
        offset: int | None = None,
        limit: int | None = None,
        wait_s: float = 0.0,
    ) -> LogChunk:
        """Return bytes of a log: from the last `tail` lines on, or from `offset`; at most 1 MiB at once.

        Continue from `next_offset`. With `wait_s`, an offset at the end of the log waits for more.
        """
        return await read_chunk(
            self._transport, ref, LogPosition(attempt, rank, tail, offset), limit=limit, wait_s=wait_s
        )

    async def follow_logs(
        self, ref: str, *, attempt: int | None = None, rank: int = 0, tail: int | None = None, offset: int | None = None
    ) -> AsyncIterator[LogChunk]:
        """Yield a log's bytes from a position on, as they are written, until the job has ended.

        It starts in the latest attempt and continues with later ones; with `attempt`, only that one. Without `tail` and
        `offset`, it starts at the beginning.
        """
        job = await self.retrying(lambda: self.job(ref))
        place = LogPosition(attempt or len(job.attempts) or 1, rank, tail, offset)

        async def read(at: LogPosition) -> LogChunk:
            return await self.retrying(lambda: read_chunk(self._transport, job.id, at, limit=None, wait_s=HOLD_S))

        async for chunk in follow_log(read, lambda n: self._job_with(job.id, n), place, only=attempt is not None):
            yield chunk

    async def _job_with(self, job_id: str, attempt: int) -> JobView:
        """Return the job when it has that attempt, or has ended."""
        job = await self.retrying(lambda: self.job(job_id))
        while not job.state.ended and len(job.attempts) < attempt:
            await self._news(job_id, job.cursor, HOLD_S)
            job = await self.retrying(lambda: self.job(job_id))
        return job

    async def search_logs(  # noqa: PLR0913 -- each is one option of the search
        self,
        ref: str,
        pattern: str,
        *,
        regex: bool = False,
        ignore_case: bool = False,
        offset: int = 0,
        line: int = 0,
        limit: int = 100,
        attempt: int | None = None,
        rank: int = 0,
    ) -> LogMatches:
        """Return lines of a log that match `pattern`, from `offset` on; `line` is the number of that line, if known."""
        params: Params = {
            "pattern": pattern,
            "regex": int(regex),
            "ignore_case": int(ignore_case),
            "offset": offset,
            "line": line,
            "limit": limit,
            "attempt": attempt,
            "rank": rank,
        }
        return await self._transport.read(LogMatches, "GET", _of(ref, "logs/search"), params=params)

    async def metrics(self, ref: str, *, keys: Sequence[str] = (), max_points: int = 500) -> MetricsPage:
        """Return a job's metrics: names and last values, and the points of those in `keys`."""
        params: Params = {"key": list(keys), "max_points": max_points}
        return await self._transport.read(MetricsPage, "GET", _of(ref, "metrics"), params=params)

    async def metrics_csv(self, ref: str, *, keys: Sequence[str] = ()) -> AsyncIterator[bytes]:
        """Yield ``step,at,key,value`` lines of all points, as bytes."""
        async with self._transport.stream(_of(ref, "metrics.csv"), params={"key": list(keys)}) as body:
            async for data in body.chunks():
                yield data

    async def files(self, ref: str) -> tuple[Artifact, ...]:
        """Return the files of a job so far."""
        return await self._transport.read(tuple[Artifact, ...], "GET", _of(ref, "files"))

    async def download(  # noqa: PLR0913 -- each is one option of the download
        self,
        ref: str,
        paths: Sequence[str] = (),
        *,
        dest: Path | Directory,
        everything: bool = False,
        replace: bool = False,
        hidden: bool = True,
        on_progress: OnProgress = no_progress,
    ) -> tuple[Downloaded, ...]:
        """Download files into `dest`, each verified against its checksum; files that are there already are skipped.

        A different file of the same name is not replaced, unless an earlier download of this job wrote it.

        Args:
            ref: the job.
            paths: names, folders or globs; by default the job's outputs, each from the latest attempt that has it.
            dest: the folder: outputs keep their names, other files have those of the store. No part of a relative path
                may be a link, nor the last part of an absolute one.
            everything: without `paths`: checkpoints, logs, tracking and records too.
            replace: whether to replace existing files with other content, and to allow a folder with files of another
                job.
            hidden: whether names may have a part that starts with a dot.
            on_progress: called with the progress of each file.

        Raises:
            ConflictError: `dest` has files of another job.
            NotYoursError: as `own_job`: somebody else's files may run code when they are opened.
            IncompleteDownloadError: some files were not downloaded, for example existing ones; all others were.
            NotFoundError: a name matches no file.
            StorageError: a file cannot be written here.
        """
        job = await self.own_job(ref)
        files = [file for file in await self.files(job.id) if not file.link]
        files = downloads.chosen(files, tuple(paths), everything=everything)
        download = downloads.Download(
            self._transport,
            job.id,
            retry=self.retrying,
            replace=replace,
            hidden=hidden,
            over_ssh=self._ssh_cluster,
            on_progress=on_progress,
        )
        named = [(file, file.path if everything else downloads.local_name(file)) for file in files]
        return await download.into(dest, named)


def _of(ref: str, verb: str = "") -> str:
    base = f"/v1/jobs/{quote(ref, safe='')}"
    return f"{base}/{verb}" if verb else base
