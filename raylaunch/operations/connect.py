"""From a cluster's spec to a client, for every interface: find its endpoint, and start or restart what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol
from urllib.parse import urlsplit

from raylaunch.client.client import PATIENCE_S, Client
from raylaunch.client.transport import NoAnswerError
from raylaunch.cluster.types import DownReport, Endpoint, Plan, Step
from raylaunch.contract import VAR_JOB
from raylaunch.errors import ClusterDownError, ClusterError, HostLostError, HostTimeoutError, HostUnreachableError
from raylaunch.models.cluster import ClusterStatus
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.job import JobView
from raylaunch.models.safe_text import clean
from raylaunch.models.states import JobState
from raylaunch.paths import cluster_paths, raylaunch_home
from raylaunch.ssh.target import OnPrompt


class Backend(Protocol):
    """Where clusters of one kind live: a module of `raylaunch.cluster`."""

    async def plan(self, spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> Plan:
        """Return what `up` would do now; change nothing."""

    async def up(
        self, spec: ClusterSpec, /, *, on_step: Callable[[Step], None], on_prompt: OnPrompt | None = None
    ) -> ClusterStatus:
        """Start what is not running, and return when the cluster accepts jobs; `on_prompt` asks a person."""

    async def down(self, spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> DownReport:
        """Stop exactly what `up` started, and return when nothing of it is running."""

    async def reach(self, spec: ClusterSpec, /) -> Endpoint:
        """Return the controller's URL and token, as reached from here."""

    async def status(self, spec: ClusterSpec, /) -> ClusterStatus:
        """Return the state of the cluster; change nothing."""


_TRIES, _PAUSE_S = 5, 0.1
"""A tunnel reports why it is down shortly after its connections break."""


def is_joined(name: str) -> bool:
    """Return whether this machine has joined a cluster of this name that somebody else runs. Reads one small file."""
    try:
        found = json.loads((raylaunch_home() / "clusters" / name / "client.json").read_bytes())
    except (OSError, ValueError):
        return False
    return bool(isinstance(found, dict) and found.get("owner"))


async def explain_silence(name: str) -> tuple[str, str]:
    """Return why a cluster on other machines does not respond, and a hint, from its tunnel; empty if unknown."""
    from raylaunch.cluster.client_record import load_client, load_tunnel  # noqa: PLC0415 -- only after an error

    paths = cluster_paths(name)
    record = load_client(paths)
    if record is None:
        return "", ""
    for _ in range(_TRIES):
        tunnel = load_tunnel(paths)
        if tunnel is not None and tunnel.alive and tunnel.why:
            return tunnel.why, tunnel.hint
        await asyncio.sleep(_PAUSE_S)
    if not record.joined:
        return "", ""
    port = record.head_ports["controller"]
    hint = f"ask {record.owner}, who runs it, to run: raylaunch up; if its port is no longer {port}, join again with"
    return "", f"{hint} a new invitation: raylaunch token create"


def backend_for(spec: ClusterSpec) -> Backend:
    """Return the backend that the spec's `kind` names."""
    match spec.kind:
        case "local":
            from raylaunch.cluster.local import backend as local  # noqa: PLC0415 -- only the backend that is used is loaded

            return local
        case "ssh":
            from raylaunch.cluster.hosts import backend as hosts  # noqa: PLC0415 -- as above

            return hosts
        case "existing":
            from raylaunch.cluster.local import existing  # noqa: PLC0415 -- as above

            return existing


_KNOCK_S = 2.0
_LOCK_S = 600.0
_WATCHDOG_S = 60.0
"""How long a watchdog on a host may take to replace a controller that hangs."""


def refuse_inside_job(environ: Mapping[str, str]) -> None:
    """Refuse to use a cluster from inside a job: a second Ray would start, and outlive the job.

    Raises:
        ClusterError: `environ` is the environment of a job's program.
    """
    if job := environ.get(VAR_JOB):
        msg = f"this is inside job {clean(job, colour=False)}, where raylaunch neither uses nor starts a cluster"
        hint = (
            f"submit jobs from outside; the program itself uses raylaunch.context() and raylaunch.report(). If this is "
            f"not a job, unset {VAR_JOB}"
        )
        raise ClusterError(msg, hint=hint)


class ClusterConnection:
    """The way to one cluster from here.

    Args:
        spec: the cluster.
        on_notice: called with a sentence that a person should read.
        on_step: called with each step when something is started.
        restarts: whether a cluster that should run, and does not, is started again. Without it nothing is started.
        prefix: `sys.prefix` if the interpreter is the person's own, for example in a notebook.
        on_prompt: asks a person when something is started; None without a person.

    Raises:
        ClusterError: this is inside a job.
    """

    def __init__(  # noqa: PLR0913 -- each is one fact about the caller
        self,
        spec: ClusterSpec,
        *,
        on_notice: Callable[[str], None],
        on_step: Callable[[Step], None],
        restarts: bool = True,
        prefix: str = "",
        on_prompt: OnPrompt | None = None,
    ) -> None:
        refuse_inside_job(os.environ)
        self.spec = spec
        self.backend: Backend = backend_for(spec)
        self._ours = not is_joined(spec.name)
        self._last: Endpoint | None = None
        self._notice = on_notice
        self.on_step = on_step
        self._restarts = restarts
        self._prefix = prefix
        self.on_prompt = on_prompt

    @contextlib.asynccontextmanager
    async def client(
        self,
        *,
        start: bool = False,
        patience_s: float = PATIENCE_S,
        before_start: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncIterator[Client]:
        """Yield a client. A cluster that should run and does not is restarted; with `start`, a missing one is started.

        Args:
            start: whether a missing cluster is started.
            patience_s: for how long requests are retried when the controller is lost.
            before_start: called before anything is started; it may raise.

        Raises:
            ClusterDownError: there is no cluster here.
            ClusterStartError: a step of starting it failed.
        """
        if self._restarts and self._ours:
            endpoint = await self._reach(start=start, before_start=before_start)
        else:
            endpoint = await self.backend.reach(self.spec)
        self._last = endpoint
        try:
            async with Client(
                endpoint,
                cluster=self.spec.name,
                patience_s=patience_s,
                on_notice=self._notice,
                restart=self._restart if self._restarts else None,
                replace_hung=self._replace_hung if self._restarts else None,
                over_ssh=endpoint.over_ssh,
                here=self._ours and self.spec.kind == "local",
                prefix=self._prefix,
                environment=self.spec.environment,
            ) as client:
                yield client
        except NoAnswerError as error:
            why, hint = await explain_silence(self.spec.name)
            raise NoAnswerError(f"{error.message}: {why}" if why else error.message, hint=hint or error.hint) from None

    async def up(self) -> ClusterStatus:
        """Start what is missing, and send the wheels of the environment that the cluster.yaml lists.

        Nodes without a package index need them, and people who submit need neither resolve nor send them then.

        Raises:
            RaylaunchError: as `Backend.up`, or there is no wheel of a package for a node.
        """
        spec = self.spec
        status = await self.backend.up(spec, on_step=self.on_step, on_prompt=self.on_prompt)
        if spec.kind == "local" or not spec.environment.requirements:
            return status
        started = time.monotonic()

        def note(sentence: str) -> None:
            self.on_step(Step("environment", "note", sentence))

        endpoint = await self.backend.reach(spec)
        async with Client(endpoint, cluster=spec.name, environment=spec.environment, on_notice=note) as client:
            sets = await client.send_environment()
        if sets:
            words = f"sent wheels of {spec.environment} for nodes with {', '.join(str(one.platform) for one in sets)}"
            self.on_step(Step("environment", "done", words, time.monotonic() - started))
        return status

    async def _started(self) -> Endpoint:
        await self.up()
        return await self.backend.reach(self.spec)

    async def running_jobs(self) -> tuple[JobView, ...]:
        """Return raylaunch's running jobs; none if no controller responds."""
        try:
            async with Client(await self.backend.reach(self.spec), cluster=self.spec.name, patience_s=0) as client:
                page = await client.jobs(states=[JobState.STARTING, JobState.RUNNING, JobState.STOPPING])
        except ClusterDownError:
            return ()
        return tuple(job for job in page.jobs if not job.foreign)

    async def would_start(self) -> bool:
        """Return whether `client` with `start` would start something, because nothing responds. Nothing is started."""
        return self._restarts and self._ours and await self._running() is None

    async def plan(self) -> Plan:
        """Return what `up` would do now, and why it would fail. Nothing is changed."""
        return await self.backend.plan(self.spec, on_prompt=self.on_prompt)

    async def _running(self) -> Endpoint | None:
        with contextlib.suppress(ClusterDownError):
            endpoint = await self.backend.reach(self.spec)
            if endpoint.over_ssh or await _answers(endpoint):  # a tunnel accepts every connection
                return endpoint
        return None

    async def _reach(self, *, start: bool, before_start: Callable[[], Awaitable[None]] | None) -> Endpoint:
        if (endpoint := await self._running()) is not None:
            return endpoint
        if start and before_start:
            await before_start()
        if await self._should_run():
            self._notice(f"cluster {self.spec.name!r} should be running, and its controller is not; restarting it")
        elif start:
            self._notice(f"there is no cluster here yet; starting {self.spec.name!r}")
        else:
            msg = "there is no cluster here"
            raise ClusterDownError(msg, hint="start it: raylaunch up")
        return await self._started()

    async def _should_run(self) -> bool:
        """Return whether this cluster should run: it was started, and not taken down."""
        if (await self.backend.status(self.spec)).state != "stopped":
            return True
        from raylaunch.cluster.record import load_record  # noqa: PLC0415

        record = load_record(cluster_paths(self.spec.name))
        return record is not None and record.wanted == "running"

    async def _restart(self) -> Endpoint:
        """Return the endpoint after the controller was lost. A cluster that was taken down is not started again.

        If the head cannot be reached, the endpoint stays the same: the client retries until its limit.
        """
        try:
            self._last = await self.backend.reach(self.spec)
        except ClusterDownError:
            if not self._ours or not await self._should_run():
                raise
            self._last = await self._started()
        except (HostUnreachableError, HostLostError, HostTimeoutError):
            if self._last is None:
                raise
        return self._last

    async def _replace_hung(self) -> Endpoint:
        """Return the endpoint after a controller stopped responding: it is replaced here, or by a host's watchdog."""
        from raylaunch.cluster.local import health  # noqa: PLC0415 -- only after an error

        self._notice(f"the controller of cluster {self.spec.name!r} is not responding; it is being restarted")
        endpoint = self._last or await self.backend.reach(self.spec)
        if self._ours and not endpoint.over_ssh:
            await health.end_hung(cluster_paths(self.spec.name), endpoint.token, lock_s=_LOCK_S)
            endpoint = await self._started()
        else:
            until = time.monotonic() + _WATCHDOG_S
            port = urlsplit(endpoint.url).port or 0
            while not await health.responds(port, endpoint.token):
                if time.monotonic() > until:
                    return endpoint
                await asyncio.sleep(_KNOCK_S)
        self._last = endpoint
        self._notice(f"cluster {self.spec.name!r} is responding again")
        return endpoint


async def _answers(endpoint: Endpoint) -> bool:
    """Return whether anything accepts connections there."""
    address = urlsplit(endpoint.url)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address.hostname, address.port), _KNOCK_S)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True
