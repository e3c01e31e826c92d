"""All printing of commands: results to stdout, everything else to stderr, colour only on a terminal.

All text is sanitised here when it is printed, and styled after that: names, reasons and messages come from jobs, hosts
and other people. Styles are marked in the text with a secret that nobody else can know.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import IO

import click
from pydantic import BaseModel, JsonValue

from raylaunch.errors import RaylaunchError
from raylaunch.models.safe_text import CleanFormatter, clean_json, one_line

_COLOURS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "cyan": 36, "dim": 2, "bold": 1}
_SECRET = os.urandom(8).hex()
_MARK = re.compile(rf"<{_SECRET}(\d+)>")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_KIB = 1024


def is_terminal(stream: IO[str]) -> bool:
    """Return whether the stream is a terminal."""
    return stream.isatty()


def colour_wanted(stream: IO[str]) -> bool:
    """Return whether colour may go to the stream: a terminal, and NO_COLOR is not set (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: IO[str] | None = None) -> str:
    """Return `text` in a colour if the stream (stdout by default) may have colour."""
    if not style or not colour_wanted(stream or sys.stdout):
        return text
    return f"<{_SECRET}{_COLOURS[style]}>{text}<{_SECRET}0>"


def _shown(line: str) -> str:
    return _MARK.sub(lambda mark: f"\x1b[{mark[1]}m", one_line(line))


def shown_text(text: str) -> str:
    """Return sanitised text of several lines, for what another module prints."""
    return "\n".join(map(_shown, text.split("\n")))


def say(text: str = "") -> None:
    """Print one line of a result; newlines in it become spaces."""
    click.echo(_shown(text), color=True)


def say_lines(lines: Iterable[str]) -> None:
    """Print a result of several lines, each like `say`."""
    click.echo("\n".join(map(_shown, lines)), color=True)


def note(text: str) -> None:
    """Print one line that is not the result."""
    click.echo(_shown(text), err=True, color=True)


def note_lines(text: str, *, indent: str = "  ") -> None:
    """Print several lines that are not the result; further lines are indented, so that none looks like one of ours."""
    for n, line in enumerate(text.split("\n")):
        note(f"{indent}{line}" if n else line)


def say_json(value: BaseModel | JsonValue) -> None:
    """Print a model, or plain data, as JSON."""
    text = value.model_dump_json(indent=2) if isinstance(value, BaseModel) else json.dumps(value, indent=2)
    click.echo(clean_json(text))


def complain(error: RaylaunchError) -> None:
    """Print an error: what failed and why, then what to do next."""
    note_lines(f"{styled('error:', 'red', sys.stderr)} {error.message}")
    if error.hint:
        note_lines(f"  → {error.hint}", indent="    ")


def complain_usage(error: click.ClickException) -> None:
    """Print what is wrong with the arguments, as click does, but sanitised: click quotes them."""
    text = io.StringIO()
    error.show(text)
    usage, begins, message = text.getvalue().rstrip("\n").rpartition("\nError: ")
    for line in usage.split("\n") if begins else ():
        note(line)
    note_lines(f"Error: {message.removeprefix('Error: ')}")


def complain_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of a bug; takes what `sys.excepthook` does."""
    note_lines("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))


def sanitise_bugs_and_logs() -> None:
    """Sanitise what Python prints by itself: tracebacks and logged warnings."""
    sys.excepthook = complain_bug
    if logging.lastResort:
        logging.lastResort.setFormatter(CleanFormatter())


def size(number: float) -> str:
    """Return bytes for people: ``512 B``, ``3.4 MiB``."""
    if number < _KIB:
        return f"{number:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        number /= _KIB
        if number < _KIB:
            return f"{number:.1f} {unit}"
    return f"{number / _KIB:.1f} TiB"


def span(seconds: float) -> str:
    """Return a duration for people: ``8 s``, ``3 m 20 s``, ``5 h 2 m``, ``3 d 4 h``."""
    whole = max(0, round(seconds))
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} m {whole % _MINUTE} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} m"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def count(number: int, one: str, many: str = "") -> str:
    """Return ``1 file``, ``3 files``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Return rows as aligned columns under their titles, one line each; columns in `right` are right-aligned."""
    lines = [tuple(titles), *(tuple(one_line(cell).replace("\t", " ") for cell in row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
