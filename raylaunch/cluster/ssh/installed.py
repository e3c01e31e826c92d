"""A session on a host through the `ssh` that is installed here, as `Talk` wants one: for many bytes.

Its ciphers cost less than ours; a connection of its own costs a fraction of a second.
"""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from raylaunch.cluster.ssh.scripts import COMMAND
from raylaunch.cluster.ssh.words import to_program

_END_S = 3.0


_LOST = (None, 255)
"""What `ssh` itself ends with where it gets no connection, or loses it."""


class Installed:
    """The session: its pipes, and how it ended."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None  # noqa: S101 -- all three are pipes
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        self._process = process
        self.stdin, self.stdout, self.stderr = process.stdin, process.stdout, process.stderr

    @property
    def exit_status(self) -> int | None:
        """What the command ended with; None while it has not, and where the connection did not last until then."""
        status = self._process.returncode
        return None if status in _LOST or (status or 0) < 0 else status

    async def wait_closed(self) -> None:
        """Wait until it has ended."""
        await self._process.wait()

    @property
    def channel(self) -> Installed:
        """What is let go of at the end."""
        return self

    def abort(self) -> None:
        """Let go of it, whatever it has not taken."""
        with suppress(ProcessLookupError):
            self._process.terminate()


@asynccontextmanager
async def installed_session(words: Sequence[str]) -> AsyncIterator[Installed]:
    """Start `ssh` with the host's shell, ready for a courier; at the end it is ended.

    Raises:
        OSError: it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        *to_program(words, COMMAND),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
    )
    session = Installed(process)
    try:
        yield session
    finally:
        session.abort()
        try:
            await asyncio.wait_for(asyncio.shield(process.wait()), _END_S)
        except asyncio.TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
