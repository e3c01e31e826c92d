"""A script while it runs on a host: its stdin, what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar, cast

import anyio
import asyncssh

from raylaunch.errors import HostError, HostLostError, HostStepError, HostTimeoutError
from raylaunch.ssh.scripts import KILL_AFTER_S, OutputFrame

_T = TypeVar("_T")

_SLACK_S = 10.0
_END_S = 5.0
_CHUNK = 256 * 1024
_PACKET = 32 * 1024  # what asyncssh sends at once: it copies what is longer once more
_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 12
_LINE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class RemoteResult:
    """How a command ended, and what it printed. `err` is the last part only, where there was much."""

    status: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        """What it printed on stdout, without the last line's end."""
        return self.out.decode(errors="replace").rstrip("\n")


class RemoteProcess:
    """A script that runs on the host: its stdin, its stdout as it comes, and how it ended."""

    def __init__(
        self,
        process: asyncssh.SSHClientProcess[bytes],
        *,
        host: str,
        step: str,
        nonce: str,
        limit_s: float,
    ) -> None:
        self.host = host
        self.step = step
        self._process = process
        self._limit_s = limit_s
        self._deadline = time.monotonic() + limit_s + KILL_AFTER_S + _SLACK_S
        self._out = OutputFrame(nonce)
        self._err = OutputFrame(nonce)
        self._tail = bytearray()
        self._errors = asyncio.ensure_future(self._read_errors())

    @property
    def ended(self) -> bool:
        """Whether the script's end has been seen."""
        return self._out.ended

    @property
    def pid(self) -> int:
        """The pid of what watches over the script on the host; 0 while that is not known."""
        return self._out.pid

    async def send(self, data: bytes | memoryview) -> bool:
        """Write to its stdin, waiting until the connection has taken it. Returns whether the script still reads."""
        view = memoryview(data)
        with suppress(OSError, asyncssh.Error):
            for at in range(0, len(view), _PACKET):
                self._process.stdin.write(cast("bytes", view[at : at + _PACKET]))
            await self._until(self._process.stdin.drain())
            return not self._process.stdin.is_closing()
        return False

    def close_input(self) -> None:
        """End its stdin."""
        with suppress(OSError, asyncssh.Error):
            self._process.stdin.write_eof()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield what it prints on stdout, as it comes, until its end.

        Raises:
            HostLostError: the connection went away first.
            HostTimeoutError: it did not end within its limit.
        """
        while not self._out.ended:
            data = await self._until(self._read(self._process.stdout))
            if not data:
                break
            if out := self._out.feed(data):
                yield out
        if rest := self._out.close():
            yield rest

    async def end(self) -> tuple[int, bytes]:
        """Return its exit status and the last part of what it printed on stderr. Its stdout must have been read.

        Raises:
            HostLostError: the connection went away, or the script's watch was ended, before there was a status.
            HostStepError: the login shell did not run it at all.
            HostTimeoutError: it did not end within its limit, and was ended.
        """
        with anyio.move_on_after(_END_S):
            await asyncio.shield(self._errors)
        err = bytes(self._tail)
        if self._out.timed_out(self._limit_s):
            raise self._timeout(err)
        if self._out.status is not None:
            return self._out.status, err
        with anyio.move_on_after(_END_S):
            await self._process.wait_closed()
        raise self._no_status(err)

    async def close(self) -> None:
        """Close the channel."""
        self._errors.cancel()
        try:
            await asyncio.gather(self._errors, return_exceptions=True)  # its own cancellation, and never ours
        finally:
            self._process.channel.abort()  # what it did not take is dropped: a channel that closes waits for that

    async def _read(self, stream: asyncssh.SSHReader[bytes]) -> bytes:
        with suppress(OSError, asyncssh.Error):
            return await stream.read(_CHUNK)
        return b""

    async def _read_errors(self) -> None:
        while not self._err.ended:
            data = await self._read(self._process.stderr)
            self._tail += self._err.feed(data) if data else self._err.close()
            del self._tail[:-_TAIL_BYTES]
            if not data:
                return

    async def _until(self, wait: Awaitable[_T]) -> _T:
        """Wait, but not longer than the script could last: the far side's own limit comes first unless it hangs."""
        with anyio.move_on_after(max(0.0, self._deadline - time.monotonic())):
            return await wait
        raise self._timeout(bytes(self._tail))

    def _timeout(self, err: bytes) -> HostTimeoutError:
        msg = f"{self.host}: {self.step} did not end within {self._limit_s:g} s{last_line(err)}"
        hint = "check what the host is busy with, then run the same command again"
        return HostTimeoutError(msg, hint=hint, host=self.host, step=self.step)

    def _no_status(self, err: bytes) -> HostError:
        status = self._process.exit_status
        if self._out.started or status is None:
            lost = f"the connection to {self.host} was lost during: {self.step}"
            if status is not None:
                lost = f"{self.host}: {self.step} was killed there before its end"
            hint = "it may or may not have finished; run the same command again to find out"
            return HostLostError(lost, hint=hint, host=self.host, step=self.step)
        noise = (self._out.noise + self._out.close() + self._err.noise + err).decode(errors="replace").strip()
        msg = f"{self.host}: the login shell did not run what it was sent ({self.step}); it printed: {noise[-500:]!r}"
        hint = "the account needs bash, and start-up files (~/.bashrc) that neither exit nor start another program"
        return HostStepError(msg, hint=hint, host=self.host, step=self.step, exit_status=status)


class RemoteLines:
    """The lines that a running script prints, as they come. `status` is its exit status, known after the last line."""

    def __init__(self, process: RemoteProcess) -> None:
        self._process = process
        self.status: int | None = None
        self.err = b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield each line without its end.

        Raises:
            HostLostError: the connection went away before the script's end.
            HostTimeoutError: the script did not end within its limit.
            HostStepError: a line is longer than 8 MiB.
        """
        held = b""
        async for data in self._process.chunks():
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                yield line
            if len(held) > _LINE_BYTES:
                msg = f"{self._process.host}: {self._process.step} printed a line of more than {_LINE_BYTES} bytes"
                raise HostStepError(msg, hint="report this", host=self._process.host, step=self._process.step)
        if held:
            yield held
        self.status, self.err = await self._process.end()


def step_error(host: str, step: str, status: int, out: bytes, err: bytes) -> HostStepError:
    """Return an error: the script failed; with the last lines that it printed."""
    printed = (err.strip() or out.strip()).decode(errors="replace").splitlines()
    tail = tuple(line.rstrip() for line in printed[-_TAIL_LINES:])
    how = f"was ended by signal {status - 128}" if status > 128 else f"failed with exit status {status}"  # noqa: PLR2004 -- the shell's way to say so
    return HostStepError(
        f"{host}: {step} {how}{last_line(err.strip() or out)}",
        hint="fix what it reports, then run the same command again",
        host=host,
        step=step,
        exit_status=status,
        tail=tail,
    )


def last_line(text: bytes) -> str:
    """Return the last line of what was printed, to be put behind a sentence; empty if there is none."""
    lines = text.decode(errors="replace").strip().splitlines()
    return f": {lines[-1].strip()[:400]}" if lines else ""
