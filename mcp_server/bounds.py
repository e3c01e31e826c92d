"""What bounds an answer: lines, bytes, and characters that neither a terminal nor JSON can bear. Pure functions."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from raylaunch.log_view import LogView, clean

MOST_BYTES = 24_000
"""Bytes of job output in one answer: about 8,000 tokens, a third of what Claude Code shows of one answer."""
_LINE_CHARS = 4000
_TOKEN = re.compile(r"[A-Za-z0-9_.:/+@=-]+")
_MIDDLE = " […] "

Json = dict[str, object]


class Lines(NamedTuple):
    """Lines of a log that fit into an answer, and what to say about those that did not."""

    lines: list[str]
    cut: str
    """Empty when nothing is missing."""


def lines_of(data: bytes) -> list[str]:
    """Return bytes of a log as lines: carriage returns applied, control characters written out, long lines cut."""
    view = LogView(terminal=False, colour=False)
    return (view.feed(data) + view.finish()).splitlines()


def last_lines(lines: list[str], *, most: int, most_bytes: int = MOST_BYTES) -> Lines:
    """Return the end of `lines` that fits into `most` lines and `most_bytes` bytes, at least the last line's end."""
    kept: list[str] = []
    room = most_bytes
    for line in reversed(lines[max(0, len(lines) - most) :]):
        size = _bytes(line) + 1
        if size > room:
            if not kept:
                kept.append(_end_of(line, room))
            break
        kept.append(line)
        room -= size
    kept.reverse()
    missing = len(lines) - len(kept)
    if missing:
        return Lines(kept, f"{missing} earlier lines are left out here")
    return Lines(kept, "the beginning of the line is left out" if kept != lines else "")


def first_lines(lines: list[str], *, most_bytes: int = MOST_BYTES) -> int:
    """Return how many lines from the first on fit into `most_bytes`; at least one."""
    room = most_bytes
    for n, line in enumerate(lines):
        room -= _bytes(line) + 1
        if room < 0:
            return max(n, 1)
    return len(lines)


def short(text: str, limit: int = 300) -> str:
    """Return text for one field: on one line, clean; of a long one beginning and end."""
    line = clean(" ".join(text.split()), colour=False)
    if len(line) <= limit:
        return line
    half = (limit - len(_MIDDLE)) // 2
    return line[:half] + _MIDDLE + line[-half:]


def token(text: str, limit: int = 99) -> str:
    """Return a name that may stand outside the fence: no spaces, so that no sentence fits into it; else nothing."""
    return text if len(text) <= limit and _TOKEN.fullmatch(text) else ""


def plain(value: object) -> object:
    """Return a value that is valid JSON in valid UTF-8: no NaN, no lone surrogates, no endless text."""
    if isinstance(value, str):
        text = value if len(value) <= _LINE_CHARS else value[:_LINE_CHARS] + "…"
        return text.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def without_empty(facts: Json) -> Json:
    """Return the facts that say something; False and 0 do."""
    return {key: value for key, value in facts.items() if value is not None and value not in ("", [], {}, ())}


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _end_of(line: str, room: int) -> str:
    return "…" + line.encode("utf-8", "replace")[-max(room - 4, 1) :].decode("utf-8", "ignore")
