"""From a job to its submission: its environment chosen, its code packed and checked, what the cluster lacks sent.

All that can be checked on this machine is checked first: before anything is sent, and before a cluster is started.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import secrets as random_source
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel

from raylaunch.client.environment_choice import active_python, choose
from raylaunch.client.git_facts import git_facts
from raylaunch.client.packing import Packed
from raylaunch.client.sensitive import NO_MORE, Allowances
from raylaunch.client.submission import check_here, check_sent, packed_job
from raylaunch.client.transfer import OnProgress, Retry, allow_upload, no_progress, upload
from raylaunch.client.transport import Transport
from raylaunch.errors import VersionError, WheelsNeededError
from raylaunch.models.cluster import ClusterPython, EnvironmentWheels
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.fields import OF_THE_CLUSTER, Environment
from raylaunch.models.job import DryRun, EnvironmentChoice, PackReport, SubmitAnswer, SubmitRequest, WheelSet
from raylaunch.models.job_spec import JobSpec
from raylaunch.version import __version__

_Model = TypeVar("_Model", bound=BaseModel)

_MISSING = 404
_UNKNOWN_TO_OLDER = ("packages", "outputs_size", "outputs_files")
_NOT_RESOLVED = (
    "nodes reach no package index, and this machine does not resolve packages that the cluster lists; name them in the "
    "job (environment: {pip: [..]}), or run raylaunch up where the cluster's cluster.yaml is: that sends their wheels"
)


class Checked(NamedTuple):
    """A job that was checked as far as can be done without its cluster, and its code. A context manager."""

    spec: JobSpec
    chosen: EnvironmentChoice | None
    packed: Packed | None

    def dry_run(self, message: str) -> DryRun:
        """Return it as the answer to a dry run."""
        packed = {"pack": self.packed.report, "package_bytes": self.packed.bytes} if self.packed else {}
        found = DryRun(fits=(), message=message, environment=self.spec.environment, chosen=self.chosen)
        return found.model_copy(update=packed)

    def __enter__(self) -> Checked:  # noqa: PYI034 -- a tuple's own type
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.packed:
            self.packed.file.close()


async def checked(spec: JobSpec, cluster: ClusterSpec, *, allow: Allowances = NO_MORE, prefix: str = "") -> Checked:
    """Check a job for a cluster that does not run, as `Submitter.submit` would, and pack its code.

    Args:
        spec: the job.
        cluster: what would be started.
        allow: what a person lets through that is refused otherwise.
        prefix: `sys.prefix` where the interpreter is the person's own.

    Raises:
        SpecError: what it needs is not there, or is not sent.
        WithheldError: its files look like secrets, or are too large.
    """
    local = cluster.kind == "local"
    chosen = choose(spec, _python_of(cluster), active_python(os.environ, prefix=prefix), here=local)
    spec = _with(spec, chosen)
    return Checked(spec, chosen, await packed_job(spec, allow))


def _with(spec: JobSpec, chosen: EnvironmentChoice | None) -> JobSpec:
    environment = chosen.environment if chosen else spec.environment
    if environment.kind == "auto":
        environment = Environment(kind="default")
    return spec.model_copy(update={"environment": environment})


def _python_of(cluster: ClusterSpec) -> ClusterPython:
    """Return what a cluster would say of its Pythons, once it runs; on this machine this interpreter runs its Ray."""
    if cluster.kind != "local":
        return ClusterPython(environment=cluster.environment)
    try:
        ray = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        ray = ""
    version = platform.python_version()
    return ClusterPython(environment=cluster.environment, version=version, prefix=sys.prefix, ray=ray)


class Submitter:
    """What submits to one cluster.

    Args:
        transport: the connection.
        retry: repeats a call while nothing answers.
        on_notice: told in a sentence what a person should know.
        here: whether the cluster is on this machine, so that jobs may use the environment that is active here.
        prefix: `sys.prefix` where the interpreter is the person's own, as in a notebook.
        environment: what the cluster.yaml on this machine says of jobs' environment.
    """

    def __init__(  # noqa: PLR0913 -- each is one fact of who submits where
        self,
        transport: Transport,
        *,
        retry: Retry,
        on_notice: Callable[[str], None],
        here: bool,
        prefix: str,
        environment: Environment | None,
    ) -> None:
        self._transport = transport
        self._retry = retry
        self._notice = on_notice
        self._here, self._prefix = here, prefix
        self._environment = environment
        self._older = ""

    async def submit(  # noqa: PLR0913 -- what to run, and who is told
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
        """Submit a job, as `raylaunch.client.client.Client.submit` does. `packed`: its code, if `checked` packed it."""
        chosen = await self._choose(spec)
        spec = _with(spec, chosen)
        key = request_id or random_source.token_hex(16)
        request = SubmitRequest(spec=spec, request_id=key, chosen=chosen, secrets=dict(secrets or {}))
        if packed is None:
            packed = await packed_job(spec, allow)
        else:
            await asyncio.to_thread(check_here, spec)
            check_sent(spec, packed.contents)
        if packed is None:
            return await self._submit(request, on_progress)
        with packed:
            if on_packed:
                on_packed(packed.report, packed.bytes)
            git = await asyncio.to_thread(git_facts, Path(spec.working_dir), sent=packed.contents.paths)
            code = {"package": packed.sha256, "pack": packed.report, "git": git}
            await upload(self._transport, packed, retry=self._retry, on_start=on_upload, on_progress=on_progress)
            return await self._submit(request.model_copy(update=code), on_progress)

    async def dry_run(
        self, spec: JobSpec, *, secrets: Mapping[str, str] | None = None, allow: Allowances = NO_MORE
    ) -> DryRun:
        """Return what `submit` would send, and where the job could run; send nothing. Checks and raises as `submit`."""
        chosen = await self._choose(spec)
        spec = _with(spec, chosen)
        with Checked(spec, chosen, await packed_job(spec, allow)) as ready:
            found = await self._placement(spec, secrets)
            if found.wheels_for:
                await self._wheels(spec, found, send=False, on_progress=no_progress)
            kept = {"pack", "package_bytes", "chosen"}
            ours = ready.dry_run("")
            return found.model_copy(update={name: getattr(ours, name) for name in kept})

    async def _choose(self, spec: JobSpec) -> EnvironmentChoice | None:
        """Return which Python environment a job gets, and why; None where the controller of 0.1.0 chooses."""
        answer = await self._retry(lambda: self._transport.request("GET", "/v1/python", allowed=(_MISSING,)))
        active = active_python(os.environ, prefix=self._prefix)
        if answer.status != _MISSING:
            self._older = ""
            return choose(spec, self._transport.read(ClusterPython, answer, "GET /v1/python"), active, here=self._here)
        self._older = answer.header("X-Raylaunch-Version", "an older version")
        if spec.environment.kind == "auto":
            self._notice(
                f"cluster {self._transport.cluster!r} runs raylaunch {self._older}, which does not report its "
                f"environments: the job gets the default one. raylaunch up replaces it; running jobs continue"
            )
        return None

    async def _submit(self, request: SubmitRequest, on_progress: OnProgress) -> SubmitAnswer:
        try:
            return await self._post(SubmitAnswer, request)
        except WheelsNeededError:
            wheels = await self._wheels_for(request.spec, on_progress)
        update = {"wheels": wheels, "wheels_sought": True}
        return await self._post(SubmitAnswer, request.model_copy(update=update))

    async def _wheels_for(self, spec: JobSpec, on_progress: OnProgress) -> tuple[WheelSet, ...]:
        without = spec.model_copy(update={"secrets": ()})  # their values are in the submission, not here
        return await self._wheels(spec, await self._placement(without), send=True, on_progress=on_progress)

    async def _wheels(
        self, spec: JobSpec, there: DryRun, *, send: bool, on_progress: OnProgress
    ) -> tuple[WheelSet, ...]:
        """Find what the environment is made of, for nodes that reach no package index, and send it.

        See `raylaunch.client.job_wheels.resolved_here` for what this machine resolves.
        """
        from raylaunch.client.job_wheels import check_wheels, resolved_here, send_wheels  # noqa: PLC0415 -- seldom, and it loads what finds wheels

        added = False
        if spec.environment.kind in OF_THE_CLUSTER:
            environment = resolved_here(there.environment, self._environment)
            added = environment is None and there.environment.kind == "pip"
            if added and not set(there.wheels_for) <= set(there.wheels_there):
                self._notice(_NOT_RESOLVED)
                return ()
            spec = spec.model_copy(update={"environment": environment or spec.environment})
        if not send:
            await check_wheels(spec, there.wheels_for, on_notice=self._notice)
            return ()
        return await send_wheels(
            self._transport,
            spec,
            there.wheels_for,
            retry=self._retry,
            on_progress=on_progress,
            on_notice=self._notice,
            added=added,
        )

    async def send_environment(self, *, on_progress: OnProgress) -> tuple[WheelSet, ...]:
        """Send the wheels of the packages that cluster.yaml lists, for nodes without an index; return what was sent.

        The cluster keeps them for all jobs that use its environment: those who submit resolve nothing then.

        Raises:
            RaylaunchError: as `raylaunch.client.job_wheels.send_wheels`.
        """
        environment = self._environment
        if environment is None or not environment.requirements:
            return ()
        from raylaunch.client.job_wheels import send_wheels  # noqa: PLC0415 -- as above

        own = JobSpec(entrypoint="true", working_dir="", environment=Environment(kind="default"))
        there = await self._placement(own)
        if not there.wheels_for:
            return ()
        sets = await send_wheels(
            self._transport,
            own.model_copy(update={"environment": environment}),
            there.wheels_for,
            retry=self._retry,
            on_progress=on_progress,
            on_notice=self._notice,
        )
        body = EnvironmentWheels(environment=environment, sets=sets)
        await self._retry(lambda: self._transport.request("PUT", "/v1/python/wheels", body=body))
        return sets

    async def _placement(self, spec: JobSpec, secrets: Mapping[str, str] | None = None) -> DryRun:
        request = SubmitRequest(spec=spec, secrets=dict(secrets or {}))
        return await self._post(DryRun, request, dry_run=True)

    async def _post(self, kind: type[_Model], request: SubmitRequest, *, dry_run: bool = False) -> _Model:
        body = _for_older(request, self._older) if self._older else request
        params = {"dry_run": "true"} if dry_run else None
        answer = await self._retry(lambda: self._transport.request("POST", "/v1/jobs", params=params, body=body))
        return self._transport.read(kind, answer, "POST /v1/jobs")


def _for_older(request: SubmitRequest, version: str) -> dict[str, object]:
    """Return a request as a controller of 0.1.0 takes it: without what it does not know.

    Raises:
        VersionError: the job asks for something that it cannot do.
    """
    body = request.model_dump(mode="json", exclude={"chosen"}, exclude_defaults=True)
    unknown = [name for name in _UNKNOWN_TO_OLDER if name in body["spec"]]
    if unknown:
        msg = f"the cluster's controller is raylaunch {version}, which does not know {', '.join(unknown)}"
        hint = f"bring it to {__version__}: raylaunch up, where its cluster.yaml is; running jobs continue"
        raise VersionError(msg, hint=hint)
    return body
