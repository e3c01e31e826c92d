"""Ranges of a file that the `ssh` that is installed writes straight into its part here.

No byte passes through Python: on the head `dd` gives a range, and here the part, at the range's place, is what `ssh`
has as its stdout. It needs an SSH account that may read the file itself, as that of who brought the cluster up; whoever
has another gets the file through the controller alone.

    ready      the program on the head has said how long the file is
    fetching   the place in the part is set, the range is ordered, and the place is watched until it is the range's end

The place belongs to the open file, which both share: only where nothing is ordered may it be set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from raylaunch.cluster.client_record import load_tunnel
from raylaunch.cluster.home import cluster_paths
from raylaunch.errors import HostLostError

_READY_S = 15.0
_SILENT_S = 30.0
_POLL_S = 0.01
_END_S = 3.0
_MARK = b"raylaunch-file "
_GIVE = 'dd if="$1" iflag=skip_bytes,count_bytes status=none'
_PROGRAM = (
    f'{_GIVE} count=0 && echo "raylaunch-file $(wc -c <"$1")" >&2 || exit 1; '
    f'while read -r at length; do {_GIVE} bs=1M skip="$at" count="$length" || exit 1; done'
)


class Straight:
    """One connection, ready; `ssh` writes into the part at the place that is set here."""

    def __init__(self, process: Process, descriptor: int) -> None:
        self._process = process
        self._descriptor = descriptor

    async def fetch(self, offset: int, length: int, on_bytes: Callable[[int], None]) -> None:
        """Bring one range, and return when all of it is written.

        Raises:
            HostLostError: the connection ended, or was silent; or the range cannot be read there or written here.
        """
        loop = asyncio.get_running_loop()
        assert self._process.stdin is not None  # noqa: S101 -- it is a pipe
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        self._process.stdin.write(f"{offset} {length}\n".encode())
        at, last = offset, loop.time()
        while at < offset + length:
            await asyncio.sleep(_POLL_S)
            ended = self._process.returncode is not None
            here = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            if here > at:
                on_bytes(here - at)
                at, last = here, loop.time()
            elif ended or loop.time() - last > _SILENT_S:
                msg = f"the connection ended, or was silent, at byte {at}"
                raise _lost(msg)
        if at != offset + length:
            msg = f"more came than was asked for, up to byte {at}"
            raise _lost(msg)


def installed_ssh(cluster: str) -> tuple[str, ...]:
    """Return the command of the `ssh` that is installed, to the cluster's head, as the tunnel has found it."""
    tunnel = load_tunnel(cluster_paths(cluster))
    return tunnel.openssh if tunnel and tunnel.up else ()


@asynccontextmanager
async def straight(words: Sequence[str], file: str, size: int, descriptor: int, first: int) -> AsyncIterator[Straight]:
    """Connect, and yield the connection once it is ready; at the end it is ended, and writes nothing any more.

    Args:
        words: the command of the `ssh` that is installed, to the head.
        file: there; an absolute path.
        size: that it must have.
        descriptor: of the part that it goes into, with a place for writing of its own; closed at the end.
        first: a place in the part where nothing is yet, and nobody else writes: a login shell may print something.

    Raises:
        HostLostError: there is no connection to be had, or the file cannot be read that way.
    """
    try:
        os.lseek(descriptor, first, os.SEEK_SET)
        command = [words[0], "-T", "-o", "RemoteCommand=none", *words[1:]]
        command.append(f"exec sh -c {shlex.quote(_PROGRAM)} sh {shlex.quote(file)}")
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=descriptor, stderr=PIPE, start_new_session=True
            )
        except OSError as error:
            msg = f"{command[0]} cannot be started: {error.strerror}"
            raise _lost(msg) from None
        draining: asyncio.Future[bytes] | None = None
        try:
            await _ready(process, size)
            assert process.stderr is not None  # noqa: S101 -- it is a pipe
            draining = asyncio.ensure_future(process.stderr.read())
            yield Straight(process, descriptor)
        finally:
            await asyncio.shield(_end(process))
            if draining is not None:
                draining.cancel()
    finally:
        os.close(descriptor)


async def _ready(process: Process, size: int) -> None:
    assert process.stderr is not None  # noqa: S101 -- it is a pipe
    said = b""
    with contextlib.suppress(asyncio.TimeoutError, ValueError):
        while line := await asyncio.wait_for(process.stderr.readline(), _READY_S):
            said = line
            if line.startswith(_MARK):
                break
    if said.removeprefix(_MARK).strip() != str(size).encode():
        raise _lost(said.decode(errors="replace").strip() or "it did not begin")


async def _end(process: Process) -> None:
    """End a program and wait until it has: SIGTERM first, SIGKILL some seconds later."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _END_S)
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _lost(why: str) -> HostLostError:
    return HostLostError(why, hint="", step="download")
