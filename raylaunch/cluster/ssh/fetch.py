"""A file from a host: its ranges over several sessions, checked, and in its place only when it is complete."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from raylaunch.cluster.home import storage_errors
from raylaunch.cluster.reach.part_file import PartFile, notes_of
from raylaunch.cluster.ssh.scripts import Script
from raylaunch.cluster.ssh.talk import step_error
from raylaunch.cluster.ssh.transfer import (
    COMMON,
    STREAMS,
    OnBytes,
    Progress,
    limit_s,
    sha_of,
    storage_words,
    together,
)
from raylaunch.directory import Directory
from raylaunch.errors import TransferError

if TYPE_CHECKING:
    from raylaunch.cluster.ssh.machine import Machine

_MEASURE_S = 600.0

_GIVE = (
    COMMON
    + r"""place "$1" 0
dd if="$path" bs=256k iflag=skip_bytes,count_bytes skip="$2" count="$3" status=none
"""
)

_MEASURE = (
    COMMON
    + r"""place "$1" 0
[ -f "$path" ] || { ls -d -- "$path"; echo "$path is not a file" >&2; exit 2; }
stat -L -c %s "$path"
sum "$path"
"""
)


async def fetch(
    machine: Machine, remote: str, local: Path, *, on_bytes: OnBytes | None = None, step: str = "fetch a file"
) -> None:
    """Get one file from a host. An interrupted one is continued by the next try.

    Args:
        machine: the host.
        remote: which file; absolute, or it begins with ``~/``.
        local: where to. It is there, 0600, when all of it is.
        on_bytes: told as bytes arrive; first, at once, of those that are here already.
        step: what this is, for errors.

    Raises:
        HostStorageError: there is no such file there, or it cannot be read.
        TransferError: what arrived is not what lies there.
        HostLostError: the connection went away.
        HostTimeoutError: for five minutes nothing has arrived.
        StorageError: it cannot be written here.
    """
    progress = Progress(on_bytes)
    with storage_words(machine.name, step):
        found = await machine.run(Script(_MEASURE, (remote,)), limit_s=_MEASURE_S, step=step)
    size, sha = found.text.split()
    part = local.with_name(f"{local.name}.part-{sha[:16]}")
    with (
        storage_errors(part),
        Directory.open(local.parent) as folder,
        PartFile(folder, part.name, int(size)) as arriving,
    ):
        progress.add(arriving.ranges.there)
        work = _Fetch(machine, remote, arriving, progress, step)
        with storage_words(machine.name, step):
            streams = [work.stream() for _ in range(min(STREAMS, len(work.queue)))]
            await together(streams, progress, host=machine.name, step=step)
    if await anyio.to_thread.run_sync(sha_of, part) != sha:
        _remove(part)
        msg = f"{remote} of {machine.name} did not arrive as it lies there; it may have changed meanwhile"
        raise TransferError(msg, hint="run the same command again")
    with storage_errors(local):
        part.replace(local)
        _remove(part)


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(notes_of(part.name)).unlink(missing_ok=True)


class _Fetch:
    """The ranges that are still to come, taken by whichever session is free."""

    def __init__(self, machine: Machine, remote: str, part: PartFile, progress: Progress, step: str) -> None:
        self.queue = deque(part.ranges.missing())
        self._machine = machine
        self._remote = remote
        self._part = part
        self._progress = progress
        self._step = step
        self._limit_s = limit_s(part.ranges.size)

    async def stream(self) -> None:
        """Take ranges, each by a session, until there are none left."""
        while self.queue:
            offset, length = self.queue.popleft()
            await self._take(offset, length)
            self._part.note(offset)

    async def _take(self, offset: int, length: int) -> None:
        script = Script(_GIVE, (self._remote, str(offset), str(length)))
        at = offset
        async with self._machine.talk(script, limit_s=self._limit_s, step=self._step, told=False) as talk:
            talk.close_input()
            async for data in talk.chunks():
                self._part.write(data, at)
                at += len(data)
                self._progress.add(len(data))
            status, err = await talk.end()
        if status or at != offset + length:
            raise step_error(self._machine.name, self._step, status or 1, b"", err or b"it became shorter meanwhile")
