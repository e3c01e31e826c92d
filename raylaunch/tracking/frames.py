"""The framing of a ``.wandb`` file: LevelDB's log format, read while another process still writes it.

Seven bytes ``:W&B``, 0xBEE1, version 0; then blocks of 32 KiB (the seven bytes count as part of the first), filled with
fragments ``crc32, length, kind`` and payload, little-endian, the CRC over kind and payload. A record that does not fit
into the rest of a block is cut into several fragments; fewer than seven bytes at a block's end are padding.
Source: https://github.com/google/leveldb/blob/main/doc/log_format.md, and files by W&B 0.28 to 0.31 (W&B's CRC is
zlib's, neither Castagnoli nor masked).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from raylaunch.errors import TrackingError

MAGIC = b":W&B\xe1\xbe"
VERSION = 0
BLOCK = 32 * 1024
_PREAMBLE = len(MAGIC) + 1
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_READ = 32 * BLOCK
_LARGEST = 32 * 1024 * 1024
"""A larger record (an artifact's manifest may be) is skipped: no row of numbers is so large."""


class Frames:
    """The records of one growing file. Holds no descriptor between reads, and never more than one record in memory.

    Args:
        path: the file.
        start: a multiple of `BLOCK`; a record that starts before it is skipped.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self._path = path
        self._at = start
        self._parts: list[bytes] | None = None
        self.skipped = 0
        """Number of damaged blocks and too large records, which were skipped."""

    def read(self) -> Iterator[bytes]:
        """Yield the records that were completed since the last read. A missing file has no records yet.

        Raises:
            TrackingError: the file is not W&B's, became shorter, or cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                if (size := os.fstat(file.fileno()).st_size) < self._at:
                    msg = f"{self._path} became shorter: {size:,} bytes, after {self._at:,} had been read"
                    raise TrackingError(msg, hint="it was replaced; read it again from its start")
                file.seek(self._at)
                while data := file.read(_READ - self._at % BLOCK):
                    before = self._at
                    yield from self._chunk(data)
                    if self._at == before or self._at % BLOCK:
                        return
        except FileNotFoundError:
            return
        except OSError as error:
            msg = f"{self._path} cannot be read: {error.strerror}"
            raise TrackingError(msg) from error

    def _chunk(self, data: bytes) -> Iterator[bytes]:
        """Yield the records in `data`, which starts at the reader's position; advance that position."""
        start = self._at
        if start == 0:
            self._at = self._preamble(data)
            if not self._at:
                return
        while (left := len(data) - (self._at - start)) > 0:
            room = BLOCK - self._at % BLOCK
            if room < _HEADER.size:
                if left < room:
                    return
                self._at += room
                continue
            if left < _HEADER.size:
                return
            record = self._fragment(memoryview(data)[self._at - start :][:room], room)
            if record is None:
                return
            if record:
                yield record

    def _preamble(self, data: bytes) -> int:
        if not data.startswith(MAGIC[: len(data)]):
            msg = f"{self._path} is not a W&B file: it starts with {data[:_PREAMBLE]!r}"
            raise TrackingError(msg)
        if len(data) < _PREAMBLE:
            return 0
        if data[len(MAGIC)] != VERSION:
            msg = f"{self._path} has W&B's file format {data[len(MAGIC)]}, this raylaunch knows {VERSION}"
            raise TrackingError(msg, hint="install a newer raylaunch, or an older wandb in the job's environment")
        return _PREAMBLE

    def _fragment(self, view: memoryview, room: int) -> bytes | None:
        """Consume one fragment; return the record that it completes or ``b""``, None if the fragment is incomplete."""
        crc, size, kind = _HEADER.unpack_from(view)
        end = _HEADER.size + size
        if end > room:
            return self._skip_block(view, room)
        if end > len(view):
            return None
        if zlib.crc32(view[_HEADER.size - 1 : end]) != crc:
            return self._skip_block(view, room)
        self._at += end
        return self._join(bytes(view[_HEADER.size : end]), kind)

    def _skip_block(self, view: memoryview, room: int) -> bytes | None:
        """Skip the rest of a damaged block, once all of it is written."""
        if len(view) < room:
            return None
        self.skipped += 1
        self._at += room
        self._parts = None
        return b""

    def _join(self, payload: bytes, kind: int) -> bytes:
        if kind == _FULL:
            self._parts = None
            return payload
        if kind == _FIRST:
            self._parts = [payload]
            return b""
        if self._parts is None:  # its start was damaged, or too large
            return b""
        self._parts.append(payload)
        if len(self._parts) * BLOCK > _LARGEST:
            self.skipped += 1
            self._parts = None
            return b""
        if kind != _LAST:
            return b""
        record = b"".join(self._parts)
        self._parts = None
        return record
