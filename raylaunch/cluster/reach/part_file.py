"""A file that arrives in ranges: a part beside its place, and a note of the ranges that it has."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from typing_extensions import Self

from raylaunch.cluster.ssh.transfer import RANGE_BYTES, Ranges


def notes_of(part: Path) -> Path:
    """Return where the ranges that a part has are noted."""
    return part.with_name(f"{part.name}.ranges")


class PartFile:
    """The part, open. A context manager; what goes wrong with the disk is an `OSError`.

    Args:
        path: of the part.
        size: of the complete file.
        grown: whether a part without notes is one that was written from its beginning on; else it counts for nothing.
        sync: whether it is on the disk when this is left.
    """

    def __init__(self, path: Path, size: int, *, grown: bool = False, sync: bool = True) -> None:
        self.path = path
        self.notes = notes_of(path)
        self.ranges = Ranges(size)
        self._grown = grown
        self._sync = sync
        self._descriptor = -1

    def __enter__(self) -> Self:
        if self.path.exists() and self.notes.exists():
            with contextlib.suppress(ValueError):  # a note that was cut off when the disk was full
                self.ranges.have = {int(word) for word in self.notes.read_text(encoding="ascii").split()}
        else:
            self.notes.unlink(missing_ok=True)
            for offset in range(0, self._whole_ranges(), RANGE_BYTES):
                self.note(offset)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        return self

    def _whole_ranges(self) -> int:
        if not self._grown or not self.path.exists():
            return 0
        return min(self.path.stat().st_size, self.ranges.size) // RANGE_BYTES * RANGE_BYTES

    def __exit__(self, *_exc: object) -> None:
        try:
            if self._sync:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

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
        with self.notes.open("a", encoding="ascii") as notes:
            notes.write(f"{offset}\n")

    def remove(self) -> None:
        """Remove both."""
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)
