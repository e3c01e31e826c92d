"""One machine over SSH: run scripts, follow their output, move files, forward ports.

With `machine` a connection is opened and, whatever happens, closed again. A command is judged by its exit status alone;
a connection that goes away before that status has come is an error, never a success. Every wait has a limit, and what
takes longer than some seconds is reported to `on_wait`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import anyio
import asyncssh

from raylaunch.errors import HostError, HostLostError, HostStepError
from raylaunch.ssh.connection import Route, connect
from raylaunch.ssh.process import RemoteLines, RemoteProcess, RemoteResult, step_error
from raylaunch.ssh.scripts import COMMAND, Script, as_script, courier, new_nonce
from raylaunch.ssh.target import OnPrompt, OnWait, Target, reporting_wait

_SESSIONS = 8  # sshd allows ten on one connection (MaxSessions); two are left for ending commands
_START_S = 20.0
_END_S = 5.0
_CHUNK = 256 * 1024
_WINDOW = 16 * 1024 * 1024
_OUTPUT_BYTES = 64 * 1024 * 1024


class SSHHost:
    """One open connection to a host. `name` is what the person calls it."""

    def __init__(self, target: Target, route: Route, *, on_wait: OnWait | None) -> None:
        self.target = target
        self.name = target.name
        self._route = route
        self._on_wait = on_wait
        self._sessions = anyio.CapacityLimiter(_SESSIONS)

    @property
    def connection(self) -> asyncssh.SSHClientConnection:
        """The connection itself, for the other modules that know asyncssh."""
        return self._route.connection

    @property
    def identity(self) -> tuple[str, str]:
        """The address at which the host was reached, as seen from the last hop, and its host key's fingerprint."""
        key, peer = self.connection.get_server_host_key(), self.connection.get_extra_info("peername")
        return str(peer[0]) if peer else "", key.get_fingerprint() if key else ""

    async def run(  # noqa: PLR0913 -- all keywords, each with a sentence
        self,
        command: Sequence[str] | Script,
        *,
        limit_s: float,
        input: bytes = b"",  # noqa: A002 -- as `subprocess.run` calls it
        env: Mapping[str, str] | None = None,
        step: str = "",
        check: bool = True,
    ) -> RemoteResult:
        """Run a script, or a list of words, to its end.

        Args:
            command: a bash script, or a program and its arguments; the latter are not interpreted by a shell.
            limit_s: seconds after which it is ended on the host, with all that it started and that did not leave its
                process group.
            input: its stdin.
            env: further variables of its environment. Not in any list of processes, unlike arguments.
            step: what is being done, for errors and for `on_wait`; by default the script's name.
            check: raise for an exit status other than 0.

        Raises:
            HostStepError: it ended with another status than 0 (only if `check`), or the login shell did not run it.
            HostTimeoutError: it did not end within its limit.
            HostLostError: the connection went away before its end.
        """
        out = bytearray()
        async with self.process(command, limit_s=limit_s, env=env, step=step) as process:
            writing = asyncio.ensure_future(_feed(process, input))
            try:
                async for data in process.chunks():
                    out += data
                    if len(out) > _OUTPUT_BYTES:
                        msg = f"{self.name}: {process.step} printed more than {_OUTPUT_BYTES} bytes"
                        raise HostStepError(msg, hint="report this", host=self.name, step=process.step)
            finally:
                writing.cancel()
            status, err = await process.end()
        if check and status:
            raise step_error(self.name, process.step, status, bytes(out), err)
        return RemoteResult(status, bytes(out), err)

    @asynccontextmanager
    async def lines(
        self,
        command: Sequence[str] | Script,
        *,
        limit_s: float,
        input: bytes = b"",  # noqa: A002 -- as in `run`
        env: Mapping[str, str] | None = None,
        step: str = "",
    ) -> AsyncIterator[RemoteLines]:
        """Run a command and yield its lines as they come; leaving the context before its end ends it on the host.

        The arguments are those of `run`. The status is judged by the caller: ``lines.status`` after the last line.
        """
        async with self.process(command, limit_s=limit_s, env=env, step=step) as process:
            writing = asyncio.ensure_future(_feed(process, input))
            try:
                yield RemoteLines(process)
            finally:
                writing.cancel()

    @asynccontextmanager
    async def process(
        self,
        command: Sequence[str] | Script,
        *,
        limit_s: float,
        env: Mapping[str, str] | None = None,
        step: str = "",
        report: bool = True,
    ) -> AsyncIterator[RemoteProcess]:
        """Start a command and yield it; leaving the context before its end ends it on the host.

        The arguments are those of `run`; with `report` false, `on_wait` is not called for it.
        """
        script = as_script(command)
        what = step or script.name or "a script"
        nonce = new_nonce()
        with reporting_wait(self._on_wait if report else None, self.name, what, limit_s):
            async with self._session(what) as session:
                process = RemoteProcess(session, host=self.name, step=what, nonce=nonce, limit_s=limit_s)
                try:
                    await process.send(courier(script, nonce=nonce, limit_s=limit_s, env=env or {}))
                    yield process
                finally:
                    ending = asyncio.ensure_future(self._end(process))
                    with anyio.CancelScope(shield=True):
                        await asyncio.wait({ending})  # not awaited plainly: a second cancel would go into it

    async def forward(self, listen_port: int, host: str, port: int) -> int:
        """Make ``127.0.0.1:listen_port`` here lead to `host`:`port` as the machine sees it; return the port here.

        It lasts as long as the connection. With 0 a free port is chosen.

        Raises:
            HostError: the port here is taken.
            HostLostError: the connection is closed.
        """
        if self.connection.is_closed():
            msg = f"the connection to {self.name} was lost"
            raise HostLostError(msg, hint="connect again", host=self.name, step="forward")
        try:
            listener = await self.connection.forward_local_port("127.0.0.1", listen_port, host, port)
        except (OSError, asyncssh.Error) as error:
            msg = f"cannot forward 127.0.0.1:{listen_port} to {host}:{port} on {self.name}: {error}"
            raise HostError(msg, hint="choose another port", host=self.name, step="forward") from None
        return int(listener.get_port())

    def keep_alive(self, *, every_s: int, missed: int) -> None:
        """Ask the host for a sign of life so often; after so many that did not come, the connection is lost."""
        self.connection.set_keepalive(every_s, missed)

    async def wait_lost(self) -> None:
        """Return when the connection has closed, for whatever reason."""
        await self.connection.wait_closed()

    async def close(self) -> None:
        """Close the connection."""
        await self._route.close()

    @asynccontextmanager
    async def _session(self, what: str) -> AsyncIterator[asyncssh.SSHClientProcess[bytes]]:
        """Open a session; wait for another's end where the host allows no more of them at once."""
        while True:
            mine = object()  # not this task: it may have other sessions open
            await self._sessions.acquire_on_behalf_of(mine)
            try:
                process = await self._start(what, alone=self._sessions.borrowed_tokens == 1)
                if process is None:
                    self._sessions.total_tokens = max(1, self._sessions.borrowed_tokens - 1)
                    continue
                yield process
                return
            finally:
                self._sessions.release_on_behalf_of(mine)

    async def _start(self, what: str, *, alone: bool) -> asyncssh.SSHClientProcess[bytes] | None:
        """Start the far side's shell; None if the host refuses and this is not the only session."""
        try:
            with anyio.fail_after(_START_S):
                return await self.connection.create_process(COMMAND, encoding=None, window=_WINDOW, stdin=asyncssh.PIPE)
        except (OSError, asyncssh.Error, TimeoutError) as error:
            if not isinstance(error, asyncssh.ChannelOpenError) or "connection closed" in error.reason:
                msg = f"the connection to {self.name} was lost before: {what}"
                raise HostLostError(msg, hint="run the same command again", host=self.name, step=what) from None
            if not alone:
                return None
            msg = f"{self.name} opens no session: {error.reason}"
            hint = "check MaxSessions in its sshd_config (usually 10), and sshd's log there"
            raise HostStepError(msg, hint=hint, host=self.name, step=what) from None

    async def _end(self, process: RemoteProcess) -> None:
        """End what a script has started, unless it has ended, and let go of its session.

        That needs a session of its own: sshd passes no signals on to the command of a root login.
        """
        if process.pid and not process.ended and not self.connection.is_closed():
            with anyio.move_on_after(_END_S), suppress(OSError, asyncssh.Error):
                await self.connection.run(f"kill -TERM {process.pid}", check=False)
        await process.close()


@asynccontextmanager
async def machine(
    target: Target, *, limit_s: float = 20, on_prompt: OnPrompt | None = None, on_wait: OnWait | None = None
) -> AsyncIterator[SSHHost]:
    """Connect to a host and yield it; the connection is closed at the end.

    Args:
        target: which host, and how it is reached.
        limit_s: seconds for the connection to each hop, besides the time that a person takes to answer.
        on_prompt: asks a person: passphrases, and whether an unknown host's key is right. None: nobody is asked.
        on_wait: called every few seconds with what has not ended yet.

    Raises:
        HostUnreachableError: no connection can be made.
        HostKeyError: the host shows a key that was not accepted.
        HostAuthError: the host takes none of the keys.
        SpecError: ``~/.ssh/config`` or a known_hosts file cannot be read.
    """
    route = await connect(target, limit_s=limit_s, on_prompt=on_prompt, on_wait=on_wait)
    opened = SSHHost(target, route, on_wait=on_wait)
    try:
        yield opened
    finally:
        await opened.close()


async def _feed(process: RemoteProcess, data: bytes) -> None:
    view = memoryview(data)
    for start in range(0, len(view), _CHUNK):
        if not await process.send(bytes(view[start : start + _CHUNK])):
            return
    process.close_input()
