"""Files that arrive in ranges of 32 MiB: which have arrived, and the part that they are written into."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
from typing_extensions import Self

from raylaunch.files import Directory

RANGE_BYTES = 32 * 1024 * 1024


@dataclass
class Ranges:
    """Which ranges of a file of `size` bytes have arrived (`have`: their offsets)."""

    size: int
    have: set[int] = field(default_factory=set)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yield the offset and the length of each missing range."""
        for offset in range(0, self.size, RANGE_BYTES):
            if offset not in self.have:
                yield offset, min(RANGE_BYTES, self.size - offset)

    @property
    def arrived_bytes(self) -> int:
        """How many bytes have arrived."""
        return self.size - sum(length for _, length in self.missing())


class PartFile:
    """The part, open. A context manager; what goes wrong with the disk is an `OSError`, as is a link in its place.

    A part without notes was written from its start on.

    Args:
        folder: where it is.
        name: of the part.
        size: of the complete file.
    """

    def __init__(self, folder: Directory, name: str, size: int) -> None:
        self._folder = folder
        self._name = name
        self._notes = notes_of(name)
        self.ranges = Ranges(size)
        self._descriptor = -1

    def __enter__(self) -> Self:
        here = self._folder.stat(self._name)
        if here is not None and self._folder.stat(self._notes) is not None:
            with (
                os.fdopen(self._folder.open_file(self._notes, os.O_RDONLY), encoding="ascii") as notes,
                contextlib.suppress(ValueError),  # a note that was cut off when the disk was full
            ):
                self.ranges.have = {int(word) for word in notes.read().split()}
        else:
            self._folder.unlink(self._notes)
            whole = min(here.st_size, self.ranges.size) if here is not None else 0
            for offset in range(0, whole // RANGE_BYTES * RANGE_BYTES, RANGE_BYTES):
                self.note(offset)
        self._descriptor = self._folder.open_file(self._name, os.O_RDWR | os.O_CREAT, 0o600)
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._descriptor)

    def opened(self) -> int:
        """Open the part once more, with a place of its own for writing; return the descriptor."""
        return self._folder.open_file(self._name, os.O_WRONLY)

    def write(self, data: bytes, at: int) -> None:
        """Write what has arrived."""
        left = memoryview(data)
        while left:  # of a disk that is nearly full some bytes are taken; the next try is refused
            written = os.pwrite(self._descriptor, left, at)
            at, left = at + written, left[written:]

    def read(self, at: int, length: int) -> bytes:
        """Read what was written; fewer bytes only at its end."""
        return os.pread(self._descriptor, length, at)

    def note(self, offset: int) -> None:
        """Note that the range at `offset` is complete."""
        self.ranges.have.add(offset)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with os.fdopen(self._folder.open_file(self._notes, flags, 0o600), "a", encoding="ascii") as notes:
            notes.write(f"{offset}\n")


def notes_of(part: str) -> str:
    """Return the name of the file in which the ranges that a part has are noted."""
    return f"{part}.ranges"


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they have ended: also when this one is cancelled meanwhile, without hurrying them.

    A plainly awaited task is cancelled again with its awaiter, in the middle of its clean-up.
    """
    for task in tasks:
        task.cancel()
    if tasks:
        with anyio.CancelScope(shield=True):
            await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not warn
