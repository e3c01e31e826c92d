"""Reading logs that may be huge, still growing, and not text: in blocks, so that memory stays flat."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from raylaunch.errors import NotFoundError, SpecError
from raylaunch.runner.contract import LOGS, RANK_LOG
from raylaunch.state import LogMatch, LogMatches

READ_BYTES = 1024 * 1024
"""Most bytes of one read."""
TAIL_BYTES = 8 * 1024 * 1024
"""How far back a tail looks for its first line."""
SEARCH_BYTES = 64 * 1024 * 1024
"""How much one search reads before it hands back what it has."""

_BLOCK = 64 * 1024
_PIECE = 64 * 1024
_TEXT = 2000


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


def log_path(job_folder: Path, *, attempt: int, rank: int) -> Path:
    """Return the log of one rank of one attempt."""
    return job_folder / f"attempt-{attempt}" / RANK_LOG.format(rank=rank)


def ranks(job_folder: Path, *, attempt: int) -> tuple[int, ...]:
    """Return the ranks of an attempt that have a log."""
    names = (path.stem for path in (job_folder / f"attempt-{attempt}" / LOGS).glob("rank-*.log"))
    return tuple(sorted(int(name[5:]) for name in names if name[5:].isdigit()))


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


def search(  # noqa: PLR0913 -- each is one option of the search
    path: Path,
    pattern: str,
    *,
    regex: bool = False,
    ignore_case: bool = False,
    offset: int = 0,
    limit: int = 100,
    max_bytes: int = SEARCH_BYTES,
) -> LogMatches:
    """Return lines that hold `pattern`, from `offset` on.

    A line is what stands between two line ends; of one that a progress bar has rewritten with carriage returns, only
    the rewriting that matches is shown. Very long lines are looked at in pieces of 64 KiB.

    Args:
        path: the log.
        pattern: text to find, or with `regex` a regular expression of Python's.
        regex: whether the pattern is a regular expression.
        ignore_case: whether case does not matter.
        offset: where to begin, bytes.
        limit: most matches to return.
        max_bytes: how much to read at most; `more` then says that the search can go on from `next_offset`.

    Raises:
        SpecError: the pattern is empty, or not a regular expression.
    """
    matches = _matcher(pattern, regex=regex, ignore_case=ignore_case)
    literal = b"" if regex or ignore_case else pattern.encode()
    found: list[LogMatch] = []
    size = size_of(path)
    position = min(max(offset, 0), size)
    if position == size:
        return LogMatches(matches=(), next_offset=position, more=False)
    stop = position + max_bytes
    with path.open("rb") as file:
        file.seek(position)
        for at, end, line in _lines(file, position, literal):
            position = end
            text = _matching_text(line, matches) if line else None
            if text is not None:
                found.append(LogMatch(offset=at, text=text))
            if len(found) >= limit or position >= stop:
                break
        else:
            return LogMatches(matches=tuple(found), next_offset=file.tell(), more=False)
    return LogMatches(matches=tuple(found), next_offset=position, more=position < size_of(path))


def check_rank(job: str, job_folder: Path, *, attempt: int, rank: int) -> None:
    """Refuse a rank that an attempt which is over never had.

    Raises:
        NotFoundError: that rank has no log; the hint names those that have.
    """
    if not log_path(job_folder, attempt=attempt, rank=rank).exists():
        there = ", ".join(str(known) for known in ranks(job_folder, attempt=attempt))
        hint = f"it has logs of these ranks: {there}" if there else f"see what it left: raylaunch files {job}"
        msg = f"attempt {attempt} of {job} has no log of rank {rank}"
        raise NotFoundError(msg, hint=hint)


def _at_character(file: BinaryIO, offset: int) -> int:
    """Move on to where a UTF-8 character begins, if the text is UTF-8."""
    file.seek(offset)
    for skipped, byte in enumerate(file.read(4)):
        if byte & 0xC0 != 0x80:  # noqa: PLR2004 -- 10xxxxxx: a byte that continues a character (RFC 3629)
            return offset + skipped
    return offset


def _matcher(pattern: str, *, regex: bool, ignore_case: bool) -> Callable[[str], bool]:
    if not pattern:
        msg = "the pattern to search for is empty"
        raise SpecError(msg, hint="give some text to find", field="pattern")
    try:
        compiled = re.compile(pattern if regex else re.escape(pattern), re.IGNORECASE if ignore_case else 0)
    except re.error as error:
        msg = f"{pattern!r} is not a regular expression: {error}"
        raise SpecError(msg, hint="correct it, or search for plain text without regex", field="pattern") from None
    return lambda text: compiled.search(text) is not None


def _lines(file: BinaryIO, offset: int, literal: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (begin, end, line), long lines in pieces; a block without `literal` is one line without bytes."""
    rest = b""
    while block := file.read(READ_BYTES):
        data = rest + block
        end = data.rfind(b"\n") + 1
        if not end and len(data) > _PIECE:
            end = len(data)
        whole, rest = data[:end], data[end:]
        if literal not in whole:
            yield offset, offset + len(whole), b""
            offset += len(whole)
            continue
        for line in _by_newline(whole):
            for start in range(0, len(line), _PIECE):
                piece = line[start : start + _PIECE]
                yield offset + start, offset + start + len(piece), piece
            offset += len(line)
    if rest:
        yield offset, offset + len(rest), rest


def _by_newline(data: bytes) -> Iterator[bytes]:
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        yield data[start : end + 1]
        start = end + 1
    if start < len(data):
        yield data[start:]


def _matching_text(line: bytes, matches: Callable[[str], bool]) -> str | None:
    for part in line.rstrip(b"\r\n").split(b"\r"):
        text = part.decode(errors="replace")
        if matches(text):
            return text if len(text) <= _TEXT else text[:_TEXT] + " …"
    return None
