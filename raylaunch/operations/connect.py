"""Which cluster is meant, where it answers, and what heals it when it does not: the way from every door to a client."""

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
from raylaunch.paths import raylaunch_home
from raylaunch.ssh.target import OnPrompt


class Backend(Protocol):
    """A place where clusters live."""

    async def plan(self, spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> Plan:
        """Say what `up` would do now, and change nothing."""
        ...

    async def up(
        self, spec: ClusterSpec, /, *, on_step: Callable[[Step], None], on_prompt: OnPrompt | None = None
    ) -> ClusterStatus:
        """Bring the cluster up, starting only what does not run, and return when it can take jobs.

        `on_prompt` asks a person, where one is there, what only a person can say.
        """
        ...

    async def down(self, spec: ClusterSpec | str, /, *, on_prompt: OnPrompt | None = None) -> DownReport:
        """End exactly what `up` started, and return when nothing of it is left."""
        ...

    async def reach(self, spec: ClusterSpec | str, /) -> Endpoint:
        """Return the controller's URL and token, as they are reached from here."""
        ...

    async def status(self, spec: ClusterSpec | str, /) -> ClusterStatus:
        """Look at the cluster, and change nothing."""
        ...


_TOLD_LATE, _PAUSE_S = 5, 0.1
"""A tunnel says why it is down a little after its connections are."""


def is_joined(name: str) -> bool:
    """Whether somebody else runs the cluster of this name, and this machine has joined it. Reads one small file."""
    try:
        found = json.loads((raylaunch_home() / "clusters" / name / "client.json").read_bytes())
    except (OSError, ValueError):
        return False
    return bool(isinstance(found, dict) and found.get("owner"))


async def explain_silence(name: str) -> tuple[str, str]:
    """Return why a cluster on other machines does not answer here, as its tunnel says, and what to do; or nothing."""
    from raylaunch.cluster.client_record import load_client, load_tunnel  # noqa: PLC0415 -- only where something is wrong
    from raylaunch.paths import cluster_paths  # noqa: PLC0415 -- as above

    paths = cluster_paths(name)
    record = load_client(paths)
    if record is None:
        return "", ""
    for _ in range(_TOLD_LATE):
        tunnel = load_tunnel(paths)
        if tunnel is not None and tunnel.alive and tunnel.why:
            return tunnel.why, tunnel.hint
        await asyncio.sleep(_PAUSE_S)
    if not record.joined:
        return "", ""
    port = record.head_ports["controller"]
    hint = (
        f"ask {record.owner}, who runs it: raylaunch up; if it is at another port than {port} there now, for a new line"
    )
    return "", f"{hint}: raylaunch token create"


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
    """Refuse what would reach or start a cluster from inside a job: a second Ray would start, and outlive the job.

    Raises:
        ClusterError: the environment is that of a job's program.
    """
    if job := environ.get(VAR_JOB):
        msg = f"this is inside job {clean(job, colour=False)}, where raylaunch reaches and starts no cluster"
        hint = (
            f"submit jobs from outside; the program itself uses raylaunch.context() and raylaunch.report(). If this is "
            f"not a job, unset {VAR_JOB}"
        )
        raise ClusterError(msg, hint=hint)


class ClusterConnection:
    """Where one cluster lives, seen from here.

    Args:
        spec: the cluster.
        on_notice: told in a sentence what a person should know meanwhile.
        on_step: told each step when something is started.
        heals: whether a cluster that should run, and does not, is started again. Without it nothing is ever started.
        prefix: `sys.prefix` where the interpreter is the person's own, as in a notebook.
        on_prompt: asks a person when something is started; None where nobody is there.

    Raises:
        ClusterError: this is inside a job.
    """

    def __init__(  # noqa: PLR0913 -- each is one fact of who asks
        self,
        spec: ClusterSpec,
        *,
        on_notice: Callable[[str], None],
        on_step: Callable[[Step], None],
        heals: bool = True,
        prefix: str = "",
        on_prompt: OnPrompt | None = None,
    ) -> None:
        refuse_inside_job(os.environ)
        self.spec = spec
        self.backend: Backend = backend_for(spec)
        self._ours = not is_joined(spec.name)
        self._last: Endpoint | None = None
        self._notice = on_notice
        self._step = on_step
        self._heals = heals
        self._prefix = prefix
        self._prompt = on_prompt

    @contextlib.asynccontextmanager
    async def client(
        self,
        *,
        start: bool = False,
        patience_s: float = PATIENCE_S,
        before_start: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncIterator[Client]:
        """Yield a client. A cluster that should run and does not is healed; with `start`, a missing one is started.

        Args:
            start: whether a missing cluster is started.
            patience_s: how long a lost controller is waited for.
            before_start: called before anything is started; it may raise.

        Raises:
            ClusterDownError: there is no cluster here.
            ClusterStartError: a step of starting it failed.
        """
        heals = self._heals and self._ours
        endpoint = (
            await self._reach(start=start, before_start=before_start) if heals else await self.backend.reach(self.spec)
        )
        self._last = endpoint
        try:
            async with Client(
                endpoint,
                cluster=self.spec.name,
                patience_s=patience_s,
                on_notice=self._notice,
                restart=self._heal if self._heals else None,
                replace_hung=self._replace_hung if self._heals else None,
                over_ssh=endpoint.over_ssh,
                here=self._ours and self.spec.kind == "local",
                prefix=self._prefix,
                environment=self.spec.environment,
            ) as client:
                yield client
        except NoAnswerError as error:
            why, hint = await explain_silence(self.spec.name)
            raise NoAnswerError(f"{error.message}: {why}" if why else error.message, hint=hint or error.hint) from None

    async def up(self) -> Endpoint:
        """Start what is missing, and return where the controller answers."""
        await bring_up(self.backend, self.spec, on_step=self._step, on_prompt=self._prompt)
        return await self.backend.reach(self.spec)

    async def running_jobs(self) -> tuple[JobView, ...]:
        """Return the jobs of ours that run; none where no controller answers."""
        try:
            async with Client(await self.backend.reach(self.spec), cluster=self.spec.name, patience_s=0) as client:
                page = await client.jobs(states=[JobState.STARTING, JobState.RUNNING, JobState.STOPPING])
        except ClusterDownError:
            return ()
        return tuple(job for job in page.jobs if not job.foreign)

    async def would_start(self) -> bool:
        """Return whether `client` with `start` would start something, because nothing answers. Nothing is started."""
        return self._heals and self._ours and await self._running() is None

    async def plan(self) -> Plan:
        """Return what `up` would do now, and why it would fail. Nothing is changed."""
        return await self.backend.plan(self.spec, on_prompt=self._prompt)

    async def _running(self) -> Endpoint | None:
        with contextlib.suppress(ClusterDownError):
            endpoint = await self.backend.reach(self.spec)
            if endpoint.over_ssh or await _answers(endpoint):  # a tunnel takes every connection
                return endpoint
        return None

    async def _reach(self, *, start: bool, before_start: Callable[[], Awaitable[None]] | None) -> Endpoint:
        if (endpoint := await self._running()) is not None:
            return endpoint
        if start and before_start:
            await before_start()
        if await self._should_run():
            self._notice(f"cluster {self.spec.name!r} should run, and its controller does not answer; healing it")
        elif start:
            self._notice(f"there is no cluster here yet; starting {self.spec.name!r}")
        else:
            msg = "there is no cluster here"
            raise ClusterDownError(msg, hint="start it: raylaunch up")
        return await self.up()

    async def _should_run(self) -> bool:
        """Return whether somebody wants this cluster to run: it was started, and not taken down."""
        if (await self.backend.status(self.spec)).state != "stopped":
            return True
        from raylaunch.cluster.record import load_record  # noqa: PLC0415
        from raylaunch.paths import cluster_paths  # noqa: PLC0415 -- only where something is wrong

        record = load_record(cluster_paths(self.spec.name))
        return record is not None and record.wanted == "running"

    async def _heal(self) -> Endpoint:
        """Return where to go on after the controller was lost. A cluster that was taken down is not started again.

        A head that cannot be reached comes back where it was: whoever asks has patience, and its limit.
        """
        try:
            self._last = await self.backend.reach(self.spec)
        except ClusterDownError:
            if not self._ours or not await self._should_run():
                raise
            self._last = await self.up()
        except (HostUnreachableError, HostLostError, HostTimeoutError):
            if self._last is None:
                raise
        return self._last

    async def _replace_hung(self) -> Endpoint:
        """Return where to go on after a controller has stopped to respond: here it is replaced, on hosts it has been.

        There its watchdog does that; the answer is waited for as long as that takes.
        """
        from raylaunch.cluster.local import health  # noqa: PLC0415 -- only where something is wrong
        from raylaunch.paths import cluster_paths  # noqa: PLC0415 -- as above

        self._notice(f"the controller of cluster {self.spec.name!r} is not responding; it is being restarted")
        endpoint = self._last or await self.backend.reach(self.spec)
        if self._ours and not endpoint.over_ssh:
            await health.end_hung(cluster_paths(self.spec.name), endpoint.token, lock_s=_LOCK_S)
            endpoint = await self.up()
        else:
            until = time.monotonic() + _WATCHDOG_S
            port = urlsplit(endpoint.url).port or 0
            while not await health.responds(port, endpoint.token):
                if time.monotonic() > until:
                    return endpoint
                await asyncio.sleep(_KNOCK_S)
        self._last = endpoint
        self._notice(f"cluster {self.spec.name!r} answers again")
        return endpoint


async def bring_up(
    backend: Backend, spec: ClusterSpec, *, on_step: Callable[[Step], None], on_prompt: OnPrompt | None = None
) -> ClusterStatus:
    """Start what is missing of a cluster, and send it the wheels of the environment that its cluster.yaml lists.

    They are for nodes that reach no package index, so that those who submit need neither resolve nor send them.

    Raises:
        RaylaunchError: as `Backend.up`, or there is no wheel of a package for a node.
    """
    status = await backend.up(spec, on_step=on_step, on_prompt=on_prompt)
    if spec.kind == "local" or not spec.environment.requirements:
        return status
    began = time.monotonic()

    def note(sentence: str) -> None:
        on_step(Step("environment", "note", sentence))

    async with Client(
        await backend.reach(spec), cluster=spec.name, environment=spec.environment, on_notice=note
    ) as client:
        sets = await client.send_environment()
    if sets:
        words = f"sent wheels of {spec.environment} for nodes with {', '.join(str(one.platform) for one in sets)}"
        on_step(Step("environment", "done", words, time.monotonic() - began))
    return status


async def _answers(endpoint: Endpoint) -> bool:
    """Return whether somebody listens there; what they say is the client's to judge."""
    address = urlsplit(endpoint.url)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address.hostname, address.port), _KNOCK_S)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True
