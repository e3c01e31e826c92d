"""A file that arrives in ranges: a part next to its place, and a note of the ranges that it has."""

from __future__ import annotations

import contextlib
import os

from typing_extensions import Self

from raylaunch.cluster.ssh.transfer import RANGE_BYTES, Ranges
from raylaunch.directory import Directory


def notes_of(part: str) -> str:
    """Return the name of the file in which the ranges that a part has are noted."""
    return f"{part}.ranges"


class PartFile:
    """The part, open. A context manager; what goes wrong with the disk is an `OSError`, as is a link in its place.

    Args:
        folder: where it is.
        name: of the part.
        size: of the complete file.
        grown: whether a part without notes is one that was written from its beginning on; else it counts for nothing.
        sync: whether it is on the disk when this is left.
    """

    def __init__(self, folder: Directory, name: str, size: int, *, grown: bool = False, sync: bool = True) -> None:
        self._folder = folder
        self._name = name
        self._notes = notes_of(name)
        self.ranges = Ranges(size)
        self._grown = grown
        self._sync = sync
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
            whole = min(here.st_size, self.ranges.size) if here is not None and self._grown else 0
            for offset in range(0, whole // RANGE_BYTES * RANGE_BYTES, RANGE_BYTES):
                self.note(offset)
        self._descriptor = self._folder.open_file(self._name, os.O_RDWR | os.O_CREAT, 0o600)
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            if self._sync:
                os.fsync(self._descriptor)
        finally:
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

    def remove(self) -> None:
        """Remove both."""
        self._folder.unlink(self._name)
        self._folder.unlink(self._notes)
