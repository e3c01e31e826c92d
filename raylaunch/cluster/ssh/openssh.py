"""The `ssh` that is installed here, as a pipe to a port of a host: cheaper than ciphers in Python.

An extra, for large files: where there is no such program, or it gets no connection by itself, ours is there anyway. It
asks nobody anything, and trusts the same files of host keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from raylaunch.cluster.ssh.places import Place, places_of
from raylaunch.cluster.ssh.target import Target
from raylaunch.errors import HostLostError

_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
_CONNECT_S = 10
_KEEPALIVE_S = 5
_KEEPALIVES_MISSED = 3
_PIPE_BYTES = 1024 * 1024
_END_S = 3.0
_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


def command(target: Target, host: str, port: int) -> list[str] | None:
    """Return the command whose stdin and stdout are a connection to `host`:`port`, as the target sees them.

    None where there is none: no such program, or a pinned fingerprint, which it cannot compare.

    Raises:
        SpecError: the SSH configuration cannot be read.
    """
    program = shutil.which("ssh")
    place = places_of(target, final=target)[-1]
    if program is None or target.fingerprint:
        return None
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "UserKnownHostsFile": " ".join(f'"{file}"' for file in place.known_files),
        "ConnectTimeout": str(_CONNECT_S),
        "ServerAliveInterval": str(_KEEPALIVE_S),
        "ServerAliveCountMax": str(_KEEPALIVES_MISSED),
        "ControlMaster": "no",  # a connection that is shared is one stream of ciphers
        "ControlPath": "none",
        "LogLevel": "ERROR",
        **({} if place.ciphers else {"Ciphers": _CIPHERS}),
        **({"ProxyJump": ",".join(target.jump)} if target.jump else {}),
    }
    words = [program, "-F", *(place.config or ("none",)), "-W", f"{host}:{port}", "-p", str(place.port)]
    for name, value in options.items():
        words += ["-o", f"{name}={value}"]
    for key in _keys(place):
        words += ["-i", key]
    return [*words, "-l", place.user, "--", target.alias]


def _keys(place: Place) -> list[str]:
    """Those that it would not find itself: it looks for its own below the account's home, whatever HOME says."""
    named = [str(Path(place.target.key).expanduser())] if place.target.key else []
    usual = (Path("~/.ssh").expanduser() / name for name in _KEYS)
    return named or ([] if place.identity_files else [str(path) for path in usual if path.exists()])


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
async def piped(words: list[str], on_data: Callable[[bytes], None]) -> AsyncIterator[Pipe]:
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
