"""A connection through a program that carries bytes on stdin and stdout, as `ssh -W` does. Standard library only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from raylaunch.errors import HostLostError

_PIPE_BYTES = 1024 * 1024
_END_S = 3.0


class Pipe(asyncio.SubprocessProtocol):
    """A connection through the program. `closed` is done when it has ended, from whichever side."""

    def __init__(self, on_data: Callable[[bytes], None]) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_data = on_data
        self._stdin: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the program's pipes; a larger one is emptied less often."""
        assert isinstance(transport, asyncio.SubprocessTransport)  # noqa: S101 -- `subprocess_exec` makes one
        stdin, stdout = transport.get_pipe_transport(0), transport.get_pipe_transport(1)
        assert isinstance(stdin, asyncio.WriteTransport)  # noqa: S101 -- it is a pipe
        self._stdin = stdin
        _widen(stdout)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Hand over what has come."""
        del fd
        self._on_data(data)

    def process_exited(self) -> None:
        """Tell that it is over."""
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, data: bytes) -> None:
        """Send some bytes."""
        assert self._stdin is not None  # noqa: S101 -- set before anybody has this
        self._stdin.write(data)


def _widen(stdout: asyncio.BaseTransport | None) -> None:
    try:
        from fcntl import F_SETPIPE_SZ, fcntl  # noqa: PLC0415 -- Linux has it

        if stdout is not None:
            fcntl(stdout.get_extra_info("pipe").fileno(), F_SETPIPE_SZ, _PIPE_BYTES)
    except (ImportError, OSError):  # it may be more than this user is allowed: then as it is
        return


@asynccontextmanager
async def piped(words: Sequence[str], on_data: Callable[[bytes], None]) -> AsyncIterator[Pipe]:
    """Start the program, and yield the connection; at the end it is ended.

    Raises:
        HostLostError: it cannot be started.
    """
    loop = asyncio.get_running_loop()
    try:
        transport, pipe = await loop.subprocess_exec(lambda: Pipe(on_data), *words, stderr=None)
    except OSError as error:
        msg = f"{words[0]} cannot be started: {error.strerror}"
        raise HostLostError(msg, hint="", step="dial") from None
    try:
        yield pipe
    finally:
        with contextlib.suppress(ProcessLookupError):
            transport.terminate()
        await asyncio.wait({pipe.closed}, timeout=_END_S)
        transport.close()  # and kills what has not ended
