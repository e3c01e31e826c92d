"""Logs of attempts in the store: their paths, their last lines, and searching them.

Logs may be huge, still growing, or binary; everything is read in blocks, in constant memory.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import re2

from raylaunch.agent.attempt_files import READ_BYTES, read, size_of
from raylaunch.contract import EXIT, LOGS, RANK_LOG
from raylaunch.errors import NotFoundError, SpecError
from raylaunch.models.job import AttemptView, LogMatch, LogMatches
from raylaunch.runner.launchers.torchrun import before_report

_LINES = 30
_BYTES = 64 * 1024
_LINE = 2000
_MOST_RANKS = 1_000_000
SEARCH_BYTES = 64 * 1024 * 1024
"""How many bytes one search reads before it returns what it has found."""
SEARCH_S = 10.0
"""How long one search takes before it returns what it has found."""
_PIECE = 64 * 1024
_TEXT = 2000
_PATTERN_CHARS = 1000
_PATTERN_MEMORY = 1024 * 1024
_SYNTAX = (
    "the syntax is RE2's: character classes, groups, alternatives and repetitions, but no lookaround ((?=…), (?<!…)) "
    "and no backreference (\\1); or search for plain text without regex"
)


def log_tail(job_folder: Path, *, attempt: int) -> tuple[str, ...]:
    """Return the last lines of an attempt's log: the failed rank's log if there is one.

    Args:
        job_folder: the job's folder in the store.
        attempt: number of the attempt.
    """
    rank = _failed_rank(job_folder / f"attempt-{attempt}" / EXIT)
    return _rank_log_tail(job_folder, attempt, rank) or _rank_log_tail(job_folder, attempt, 0)


def _rank_log_tail(job_folder: Path, attempt: int, rank: int) -> tuple[str, ...]:
    log = log_path(job_folder, attempt=attempt, rank=rank)
    start = max(0, size_of(log) - _BYTES)
    text = read(log, offset=start).data.decode(errors="replace")
    if start:
        text = text.partition("\n")[2] or text
    lines = before_report(text).splitlines() or text.splitlines()
    return tuple(line.rstrip("\r")[-_LINE:] for line in lines[-_LINES:])


def _failed_rank(exit_file: Path) -> int:
    try:
        found = json.loads(exit_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return 0
    rank = found.get("failed_rank") if isinstance(found, dict) else None
    return rank if isinstance(rank, int) and 0 <= rank < _MOST_RANKS else 0


def log_path(job_folder: Path, *, attempt: int, rank: int) -> Path:
    """Return the log of one rank of one attempt."""
    return job_folder / f"attempt-{attempt}" / RANK_LOG.format(rank=rank)


def ranks(job_folder: Path, *, attempt: int) -> tuple[int, ...]:
    """Return the ranks of an attempt that have a log."""
    names = (path.stem for path in (job_folder / f"attempt-{attempt}" / LOGS).glob("rank-*.log"))
    return tuple(sorted(int(name[5:]) for name in names if name[5:].isdigit()))


class LogSearch(NamedTuple):
    """A search in a log."""

    pattern: str
    """Text to find, or with `regex` a regular expression in RE2's syntax."""
    regex: bool = False
    ignore_case: bool = False
    offset: int = 0
    """Where to start, bytes."""
    line: int = 0
    """The number of the line there, if known; it is 1 at the start of the log."""
    limit: int = 100
    """Maximum number of matches."""


def search(path: Path, query: LogSearch, *, max_bytes: int = SEARCH_BYTES) -> LogMatches:
    """Return the lines that match.

    Lines end with a newline. If a progress bar has rewritten a line with carriage returns, only the matching version is
    returned. Very long lines are searched in pieces of 64 KiB.

    Args:
        path: the log.
        query: the search.
        max_bytes: how much to read at most; then `more` is set, and the search can continue at `next_offset`.

    Raises:
        SpecError: the pattern is empty, too long, or not a regular expression.
    """
    _matcher(query)
    size = size_of(path)
    start = min(max(query.offset, 0), size)
    if start == size:
        return LogMatches(matches=(), next_offset=start, more=False, next_line=query.line)
    with path.open("rb") as file:
        file.seek(start)
        found = search_in(file, query._replace(offset=start), max_bytes=max_bytes)
    return found.model_copy(update={"more": found.more and found.next_offset < size_of(path)})


class LogBlocks(Protocol):
    """A source of a log's bytes."""

    def read(self, limit: int, /) -> bytes:
        """Return the next bytes, at most `limit`; empty at the end."""


def search_in(log: LogBlocks, query: LogSearch, *, max_bytes: int = SEARCH_BYTES) -> LogMatches:
    """Search a log from its position `query.offset` on; like `search`, but `more` may be set even at the end."""
    until = time.monotonic() + SEARCH_S
    matches = _matcher(query)
    literal = b"" if query.regex or query.ignore_case else query.pattern.encode()
    found: list[LogMatch] = []
    position, number = query.offset, query.line if query.offset else 1
    for at, end, piece, ends in _lines(log, query.offset, literal):
        position = end
        text = _matching_text(piece, matches) if piece else None
        if text is not None:
            found.append(LogMatch(offset=at, text=text, line=number))
        number += ends if number else 0
        if len(found) >= query.limit or position >= query.offset + max_bytes or time.monotonic() > until:
            return LogMatches(matches=tuple(found), next_offset=position, more=True, next_line=number)
    return LogMatches(matches=tuple(found), next_offset=position, more=False, next_line=number)


def check_known_rank(job: str, job_folder: Path, attempt: AttemptView, *, rank: int) -> None:
    """Refuse a rank that an attempt will never have; while it is running, only if the number of ranks is known.

    Raises:
        NotFoundError: there is no such rank; the hint lists the ranks.
    """
    known = attempt.ranks if attempt.started_at is not None else 0
    if known and rank >= known and not log_path(job_folder, attempt=attempt.n, rank=rank).exists():
        msg = f"attempt {attempt.n} of {job} has no rank {rank}"
        raise NotFoundError(msg, hint=f"it has {known} ranks: 0 to {known - 1}" if known > 1 else "it has rank 0 only")


def check_rank(job: str, job_folder: Path, *, attempt: int, rank: int) -> None:
    """Refuse a rank that an ended attempt never had.

    Raises:
        NotFoundError: that rank has no log; the hint lists the ranks with logs.
    """
    if not log_path(job_folder, attempt=attempt, rank=rank).exists():
        there = ", ".join(str(known) for known in ranks(job_folder, attempt=attempt))
        hint = f"it has logs of these ranks: {there}" if there else f"see its files: raylaunch files {job}"
        msg = f"attempt {attempt} of {job} has no log of rank {rank}"
        raise NotFoundError(msg, hint=hint)


def _matcher(query: LogSearch) -> Callable[[str], bool]:
    """Return a function that tests whether a text matches.

    RE2 takes linear time for every pattern; Python's `re` can be made to take hours, and holds the GIL meanwhile.
    """
    pattern = query.pattern
    if not pattern:
        msg = "the pattern to search for is empty"
        raise SpecError(msg, hint="give some text to find", field="pattern")
    if len(pattern) > _PATTERN_CHARS:
        msg = f"the pattern to search for has {len(pattern)} characters; at most {_PATTERN_CHARS} are supported"
        raise SpecError(msg, hint="search for a part of it", field="pattern")
    options = re2.Options()
    options.literal = not query.regex
    options.case_sensitive = not query.ignore_case
    options.log_errors = False
    options.max_mem = _PATTERN_MEMORY
    try:
        compiled = re2.compile(pattern, options=options)
    except (re2.error, UnicodeEncodeError) as error:
        msg = f"{pattern!r} is not a supported regular expression: {_regex_error(error)}"
        raise SpecError(msg, hint=_SYNTAX, field="pattern") from None
    return lambda text: compiled.search(text) is not None


def _regex_error(error: Exception) -> str:
    """Return RE2's error message, which is bytes."""
    text = error.args[0] if error.args else ""
    if isinstance(error, UnicodeEncodeError):
        return "it contains a lone surrogate"
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _lines(log: LogBlocks, offset: int, literal: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    """Yield (start, end, line, newlines), long lines in pieces; a block without `literal` as a line without bytes."""
    rest = b""
    while block := log.read(READ_BYTES):
        data = rest + block
        end = data.rfind(b"\n") + 1
        if not end and len(data) > _PIECE:
            end = len(data)
        whole, rest = data[:end], data[end:]
        if literal not in whole:
            yield offset, offset + len(whole), b"", whole.count(b"\n")
            offset += len(whole)
            continue
        for line in io.BytesIO(whole):
            for start in range(0, len(line), _PIECE):
                piece = line[start : start + _PIECE]
                yield offset + start, offset + start + len(piece), piece, piece.endswith(b"\n")
            offset += len(line)
    if rest:
        yield offset, offset + len(rest), rest, 0


def _matching_text(line: bytes, matches: Callable[[str], bool]) -> str | None:
    for part in line.rstrip(b"\r\n").split(b"\r"):
        text = part.decode(errors="replace")
        if matches(text):
            return text if len(text) <= _TEXT else text[:_TEXT] + " …"
    return None
