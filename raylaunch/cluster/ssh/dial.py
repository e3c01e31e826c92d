"""A TCP connection that a machine makes for us: bytes out, and what comes back handed over as it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import asyncssh

from raylaunch.errors import HostLostError

if TYPE_CHECKING:
    from raylaunch.cluster.ssh.machine import Machine

_WINDOW = 2 * 1024 * 1024  # sshd copies a long buffer again with all that comes, so that a larger one is slower


class Call:
    """One connection. `closed` is done when the other side has ended it."""

    def __init__(self, channel: asyncssh.SSHTCPChannel[bytes], closed: asyncio.Future[None]) -> None:
        self._channel = channel
        self.closed = closed

    def send(self, data: bytes) -> None:
        """Send some bytes."""
        self._channel.write(data)


class _Session(asyncssh.SSHTCPSession[bytes]):
    """What asyncssh tells of the connection."""

    def __init__(self, on_data: Callable[[bytes], None]) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_data = on_data

    def data_received(self, data: bytes, datatype: int | None) -> None:
        del datatype
        self._on_data(data)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if not self.closed.done():
            self.closed.set_result(None)


async def dial(machine: Machine, host: str, port: int, on_data: Callable[[bytes], None]) -> Call:
    """Let the machine connect to `host`:`port`, as it sees them; it lasts as long as the machine's connection.

    Raises:
        HostLostError: it cannot, or is not there any more.
    """
    try:
        channel, session = await machine.connection.create_connection(
            lambda: _Session(on_data), host, port, window=_WINDOW
        )
    except (OSError, asyncssh.Error) as error:
        msg = f"{machine.name} does not connect us to {host}:{port}: {error}"
        raise HostLostError(msg, hint="run the same command again", host=machine.name, step="dial") from None
    assert isinstance(session, _Session)  # noqa: S101 -- it was made above
    return Call(channel, session.closed)
