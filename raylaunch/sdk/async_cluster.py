"""A cluster, asynchronously. `Cluster`, the blocking form, is generated from this module."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

from typing_extensions import Self

from raylaunch.client.client import Client
from raylaunch.client.sensitive import allowed
from raylaunch.client.submission import with_wandb
from raylaunch.cluster.types import DownReport, Endpoint, Plan, Step
from raylaunch.config.validation import job_states
from raylaunch.models.cluster import ClusterStatus, ControllerStatus
from raylaunch.models.fields import Environment
from raylaunch.models.job import DryRun, PackReport
from raylaunch.models.job_spec import JobSpec, Launcher, Resources, Tracking, Where
from raylaunch.models.states import JobState
from raylaunch.operations.connect import ClusterConnection
from raylaunch.operations.upgrade import take_down
from raylaunch.sdk.arguments import (
    Asked,
    Which,
    bring_up,
    cluster_of,
    cluster_spec_of,
    cluster_to_reach,
    spec_of,
)
from raylaunch.sdk.async_job import AsyncJob
from raylaunch.sdk.display import OnStep, cluster_html, cluster_line, show_steps

_PAGE = 500

_log = logging.getLogger(__name__)

Notice = Callable[[str], None]
"""Called with a sentence that a person should read."""


def log_notice(sentence: str) -> None:
    """Log a notice. Python shows warnings on stderr where nobody has configured logging, as in a notebook."""
    _log.warning("%s", sentence)


class AsyncCluster:
    """One cluster. An async context manager; `raylaunch.aconnect` makes it.

    All verbs raise `ClusterDownError` when nothing answers, and `AccessError` when the token may not do it.

    ::

        async with await raylaunch.aconnect() as cluster:
            job = await cluster.submit("python train.py", gpus=1)
            await job.result()
    """

    def __init__(self, client: Client, *, name: str, holds: contextlib.AsyncExitStack, seen: ControllerStatus) -> None:
        self._client = client
        self._name = name
        self._holds = holds
        self._seen = seen

    @classmethod
    async def connect(
        cls,
        name: str = "",
        *,
        start: bool = True,
        cluster_file: Path | str | None = None,
        reach: Endpoint | None = None,
        on_notice: Notice = log_notice,
    ) -> Self:
        """Return the cluster, which has answered.

        Args:
            name: a cluster's name; by default the one that cluster.yaml here describes, else the embedded ``local``.
            start: whether a cluster that does not run is started. One that should run and does not is always restarted.
            cluster_file: another cluster.yaml.
            reach: address and token of a controller, where they are known already, for example with a tunnel of your
                own. Nothing is started or restarted then.
            on_notice: called with a sentence when something is started or was lost; by default that is logged as a
                warning.

        Raises:
            ClusterDownError: there is no cluster, and `start` is False; or nothing responds at `reach`.
            ClusterStartError: a step of starting it failed.
            SpecError: the file cannot be read, or has an invalid value.
        """
        async with contextlib.AsyncExitStack() as stack:
            if reach is not None:
                label = name or "local"
                client = await stack.enter_async_context(Client(reach, cluster=label, on_notice=on_notice))
            else:
                spec = cluster_spec_of(name, Path(cluster_file) if cluster_file else None)
                place = ClusterConnection(spec, on_notice=on_notice, on_step=show_steps(spec.name), prefix=sys.prefix)
                label, client = spec.name, await stack.enter_async_context(place.client(start=start))
            seen = await client.status()
            return cls(client, name=label, holds=stack.pop_all(), seen=seen)

    @classmethod
    async def plan(cls, which: Which = "") -> Plan:
        """Return what `up` would do now. Nothing is changed; the plan prints itself.

        Args:
            which: the cluster: a name, a cluster file's `Path`, or a `ClusterSpec`; by default the one that applies
                here.

        Raises:
            ClusterError: this machine, or what runs on it, is not suitable. For hosts over SSH see the plan's problems.
            SpecError: the file cannot be read, or has an invalid value.
        """
        spec = cluster_to_reach(which)
        return await ClusterConnection(spec, on_notice=log_notice, on_step=show_steps(spec.name)).backend.plan(spec)

    @classmethod
    async def up(
        cls,
        which: Which = "",
        *,
        upgrade: bool = False,
        stop: bool = False,
        on_step: OnStep | None = None,
        on_notice: Notice = log_notice,
    ) -> Self:
        """Start the cluster, or what is missing of it; return it when it can take jobs.

        It may be repeated: what already runs is left alone. There are no prompts: what needs a person (an unknown host
        key, a passphrase) is an error that says what to type in a terminal.

        Args:
            which: the cluster, as for `plan`.
            upgrade: whether a Ray of another version is stopped and this one started, once no job runs. Without it
                such a cluster is refused.
            stop: for `upgrade`, whether jobs are stopped, each with its own grace period, and retried; else `up` waits
                until they have ended.
            on_step: called with each step; by default a notebook shows them, and elsewhere they are logged.
            on_notice: called with a sentence that a person should read.

        Raises:
            ClusterStartError: something is still missing, host by host. What has started keeps running.
            ClusterError: this machine, or what runs on it, is not suitable.
            SpecError: the file cannot be read, or has an invalid value.
        """
        spec = cluster_to_reach(which)
        report = on_step or show_steps(spec.name)
        place = ClusterConnection(spec, on_notice=on_notice, on_step=report, prefix=sys.prefix)
        async with contextlib.AsyncExitStack() as stack:
            await bring_up(place, upgrade=upgrade, stop=stop)
            client = await stack.enter_async_context(place.client())
            seen = await client.status()
            return cls(client, name=spec.name, holds=stack.pop_all(), seen=seen)

    @classmethod
    async def up_steps(cls, which: Which = "", *, on_notice: Notice = log_notice) -> AsyncGenerator[Step, None]:
        """Yield each step of an `up` as it happens; the cluster can take jobs when there are no more.

        Closing the generator cancels the bring-up; the next one continues from there.

        Args:
            which: the cluster, as for `plan`.
            on_notice: called with a sentence that a person should read.

        Raises:
            ClusterStartError: something is still missing, host by host. What has started keeps running.
        """
        steps: asyncio.Queue[Step | None] = asyncio.Queue()
        place = ClusterConnection(cluster_to_reach(which), on_notice=on_notice, on_step=steps.put_nowait)
        work = asyncio.ensure_future(place.up())
        work.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (step := await steps.get()) is not None:
                yield step
            await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    @classmethod
    async def look(cls, which: Which = "") -> ClusterStatus:
        """Return the status of a cluster: ``running``, ``degraded`` or ``stopped``. Nothing is started or changed.

        Args:
            which: the cluster, as for `plan`.

        Raises:
            SpecError: the file cannot be read, or has an invalid value.
        """
        spec = cluster_of(which)
        return await ClusterConnection(spec, on_notice=log_notice, on_step=show_steps(spec.name)).backend.status(spec)

    @classmethod
    async def down(
        cls, which: Which, *, stop: bool = False, force: bool = False, on_step: OnStep | None = None
    ) -> DownReport:
        """Stop exactly what `up` started; return what that was, once all of it has ended. The store stays.

        Args:
            which: the cluster, as for `plan`. It has to be named.
            stop: whether jobs are stopped first, each with its own grace period; the next `up` retries them.
            force: whether they are killed at once; the next `up` retries them too.
            on_step: called with what `down` waits for; by default as for `up`.

        Raises:
            ConflictError: jobs run, and neither `stop` nor `force` is True.
            ClusterError: something could not be stopped; the message says what.
        """
        spec = cluster_of(which)
        report = on_step or show_steps(spec.name)
        place = ClusterConnection(spec, on_notice=log_notice, on_step=report, restarts=False)
        hint = "stop them with their grace time: down(…, stop=True); or at once: force=True. The next up retries them"
        return await take_down(place, stop=stop, force=force, hint=hint)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self._name

    def __repr__(self) -> str:
        return cluster_line(self._name, self._seen).replace("<Cluster", "<AsyncCluster", 1)

    def _repr_html_(self) -> str:
        return cluster_html(self._name, self._seen)

    async def close(self) -> None:
        """Close the connection. Cluster and jobs keep running."""
        await self._holds.aclose()

    async def status(self) -> ControllerStatus:
        """Return the status of the controller, Ray and the nodes."""
        self._seen = await self._client.status()
        return self._seen

    async def submit(  # noqa: PLR0913 -- each is one field of a job
        self,
        job: Asked,
        *,
        name: str | None = None,
        gpus: int | None = None,
        launcher: Launcher | None = None,
        processes: int | None = None,
        working_dir: Path | str | None = None,
        resources: Resources | Mapping[str, object] | None = None,
        where: Where | Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
        secrets: Sequence[str] | None = None,
        environment: Environment | Mapping[str, object] | str | None = None,
        packages: Sequence[str] | str | None = None,
        timeout_s: float | str | None = None,
        grace_s: float | str | None = None,
        outputs: Sequence[str] | str | None = None,
        outputs_size: int | str | None = None,
        outputs_files: int | None = None,
        tags: Sequence[str] | str | None = None,
        tracking: Tracking | Mapping[str, object] | None = None,
        priority: int | None = None,
        retries: int | None = None,
        request_id: str = "",
        allow: Sequence[str] | str = (),
        max_upload: str | int | None = None,
    ) -> AsyncJob:
        """Pack the working directory, send what the cluster does not have yet, and submit.

        The keywords are the fields of a job file. With None, the value in `job` or else the default applies; `env` and
        lists add to those in `job`.

        Args:
            job: a shell command (text), a program with its arguments (a list), a job file (a `Path`), or a `JobSpec`.
            name: letters, digits, ``.``, ``_``, ``-``; by default made from the command.
            gpus: GPUs on the node; short for ``resources={"gpus": …}``.
            launcher: ``torchrun`` starts one rank of the program a GPU, ``ray`` is for a Ray Train or Tune program.
            processes: ranks that torchrun starts; by default one a GPU, else 1.
            working_dir: the folder that is packed; by default the current one, "" for none.
            resources: GPUs, CPUs, memory, custom resources.
            where: which nodes it may run on.
            env: environment variables.
            secrets: names of secrets that become environment variables; the cluster holds their values.
            environment: the Python environment, for example ``conda:train``; by default the first that applies of
                cluster.yaml's, ``uv.lock`` in the working directory, this Python's own, and the cluster's.
            packages: added to that environment, for example ``["numpy", "pandas==2.3.3"]``.
            timeout_s: the longest run of one attempt: seconds, or text, for example ``2h``.
            grace_s: time between SIGTERM and SIGKILL at a stop: seconds, or text.
            outputs: ``auto`` (what is new in the working directory), ``none``, or files and globs to keep.
            outputs_size: how much ``auto`` keeps, for example ``5GiB``.
            outputs_files: how many files ``auto`` keeps.
            tags: words to find the job by.
            tracking: Weights & Biases. Missing settings are taken from this Python's ``WANDB_MODE``,
                ``WANDB_PROJECT`` and so on; the key in ``WANDB_API_KEY`` is sent for this job only.
            priority: from -100 to 100; higher goes first.
            retries: more attempts when the program fails.
            request_id: the same id with the same job returns the existing job, also from another Python process.
            allow: files to send although they look like secrets: names (``.env``) or paths in the working directory.
            max_upload: the largest upload, for example ``5GB``, or in bytes; by default 1 GB.

        Returns:
            The job. It waits for its turn, and does not need this process any more.

        Raises:
            TransferError: the code was damaged on its way.
            SpecError: an invalid value, a folder that cannot be packed, or a job that no node could ever run.
            WithheldError: files look like secrets, or the upload is too large; nothing was sent.
            ConflictError: `request_id` was used for something else.
        """
        given = {field: value for field, value in locals().items() if field in JobSpec.model_fields}
        spec, values, taken = with_wandb(spec_of(job, given, gpus=gpus), os.environ)
        if taken:
            _log.info("W&B from this environment: %s", ", ".join(taken))
        answer = await self._client.submit(
            spec,
            request_id=request_id,
            secrets=values,
            allow=allowed((allow,) if isinstance(allow, str) else allow, max_upload),
            on_packed=_log_packed,
        )
        _log.info("%s", answer.job.chosen or "")
        return AsyncJob(self._client, answer.job)

    async def dry_run(
        self,
        job: Asked,
        *,
        gpus: int | None = None,
        allow: Sequence[str] | str = (),
        max_upload: str | int | None = None,
    ) -> DryRun:
        """Return what would be sent and where the job could run, without submitting it. Everything is checked.

        Args:
            job: as for `submit`.
            gpus: GPUs on the node.
            allow: as for `submit`.
            max_upload: as for `submit`.

        Raises:
            SpecError: as for `submit`.
            WithheldError: as for `submit`.
        """
        spec, values, _taken = with_wandb(spec_of(job, {}, gpus=gpus), os.environ)
        names = (allow,) if isinstance(allow, str) else allow
        return await self._client.dry_run(spec, secrets=values, allow=allowed(names, max_upload))

    async def job(self, ref: str = "last") -> AsyncJob:
        """Return a job.

        Args:
            ref: its id, its name (then your latest job of that name), or ``last``. If you have none of that name,
                somebody else's is returned with a notice, and it is read-only: its id is needed to stop or remove it,
                or to download its files.

        Raises:
            NotFoundError: there is no such job; the message names the nearest.
        """
        return AsyncJob(self._client, await self._client.job(ref), asked=ref)

    async def jobs(  # noqa: PLR0913 -- each is one filter
        self,
        *,
        states: Sequence[JobState | str] = (),
        name: str = "",
        owner: str = "",
        tag: str = "",
        since: float | None = None,
        limit: int = 50,
    ) -> tuple[AsyncJob, ...]:
        """Return jobs, newest first.

        Args:
            states: only jobs in these states, for example ``["running", "queued"]``.
            name: only jobs of this name.
            owner: only jobs of this person.
            tag: only jobs with this tag.
            since: only jobs submitted since then, in seconds since the epoch.
            limit: jobs at most.

        Raises:
            SpecError: a word is not a state.
        """
        wanted, found, cursor = job_states(states), list[AsyncJob](), ""
        while len(found) < limit:
            page = await self._client.jobs(
                states=wanted,
                name=name,
                owner=owner,
                tag=tag,
                since=since,
                limit=min(limit - len(found), _PAGE),
                cursor=cursor,
            )
            found += [AsyncJob(self._client, view) for view in page.jobs]
            cursor = page.next_cursor
            if not cursor:
                break
        return tuple(found)


def _log_packed(report: PackReport, archive_bytes: int) -> None:
    _log.info("packed %d files, %d bytes to send; %d files skipped", report.files, archive_bytes, report.ignored)
