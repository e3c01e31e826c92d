"""Reading files that may be huge, still grow, and are not text: in blocks, so that memory stays flat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

READ_BYTES = 1024 * 1024
"""Most bytes of one read."""
TAIL_BYTES = 8 * 1024 * 1024
"""How far back a tail looks for its first line."""

_BLOCK = 64 * 1024


@dataclass(frozen=True)
class Slice:
    """Some bytes of a log: those from `offset` on, of a log of `size` bytes."""

    offset: int
    data: bytes
    size: int

    @property
    def next(self) -> int:
        """Where the next read begins."""
        return self.offset + len(self.data)


def size_of(path: Path) -> int:
    """Return the log's size in bytes; 0 before it exists."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read(path: Path, *, offset: int, limit: int = READ_BYTES) -> Slice:
    """Return at most `limit` bytes from `offset` on. A log that does not exist yet is an empty one."""
    size = size_of(path)
    start = min(max(offset, 0), size)
    if start == size:
        return Slice(start, b"", size)
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(min(limit, READ_BYTES))
    return Slice(start, data, max(size, start + len(data)))


def tail_offset(path: Path, lines: int, *, max_back: int = TAIL_BYTES) -> int:
    """Return where the last `lines` lines begin, found backwards in blocks, at most `max_back` bytes before the end."""
    size = size_of(path)
    if lines <= 0 or size == 0:
        return size
    floor = max(0, size - max_back)
    with path.open("rb") as file:
        end, found = size, 0
        while end > floor:
            start = max(floor, end - _BLOCK)
            file.seek(start)
            block = file.read(end - start)
            if end == size and block.endswith(b"\n"):
                block = block[:-1]  # the end of the last line is not the begin of another
            position = len(block)
            while (position := block.rfind(b"\n", 0, position)) >= 0:
                found += 1
                if found == lines:
                    return start + position + 1
            end = start
        return _at_character(file, floor)


def _at_character(file: BinaryIO, offset: int) -> int:
    """Move on to where a UTF-8 character begins, if the text is UTF-8."""
    file.seek(offset)
    for skipped, byte in enumerate(file.read(4)):
        if byte & 0xC0 != 0x80:  # noqa: PLR2004 -- 10xxxxxx: a byte that continues a character (RFC 3629)
            return offset + skipped
    return offset
