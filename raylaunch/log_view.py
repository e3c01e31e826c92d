"""Log bytes for people's eyes: whatever a job wrote, it moves no cursor, floods no line, and ends no reading."""

from __future__ import annotations

import codecs
import re

LINE_LIMIT = 4000
"""Characters of a line that are shown."""

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_OTHER_CSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-ln-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_UNFINISHED = re.compile(r"\x1b(\[[0-?]*[ -/]*)?\Z")
_PARTS = re.compile(r"\n|\r|[^\r\n]+")
_LONGEST_SEQUENCE = 32


def clean(text: str, *, colour: bool) -> str:
    r"""Return text without line ends that a terminal may show: other control characters are written as ``\x07``.

    Args:
        text: as it was decoded.
        colour: whether colour sequences stay; else they are dropped, as those that move the cursor always are.
    """
    if text.isprintable():
        return text
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match.group())
        return "\ue000"

    text = text.replace("\ue000", "\ufffd")  # a private character that stands for a kept colour below
    text = _COLOUR.sub(keep if colour else "", text)
    text = _CONTROL.sub(_written, _OTHER_CSI.sub("", text))
    colours = iter(kept)
    return re.sub("\ue000", lambda _: next(colours), text) if kept else text


def _written(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004 -- one byte


class LogView:
    """Turns the bytes of a log, piece by piece, into what is shown. Memory stays flat, however long a line is.

    On a terminal a progress bar's carriage returns work as they should, and a line shows while it is being written.
    Elsewhere only the last state of such a line is given, when it ends.
    """

    def __init__(self, *, terminal: bool, colour: bool) -> None:
        self._terminal = terminal
        self._colour = terminal and colour
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._line: list[str] = []
        self._chars = 0
        self._bytes = 0
        self._returned = False

    def feed(self, data: bytes) -> str:
        """Return what is to be printed now."""
        text = self._held + self._decoder.decode(data)
        unfinished = _UNFINISHED.search(text, max(0, len(text) - _LONGEST_SEQUENCE))
        self._held = unfinished.group() if unfinished else ""
        return self._shown(text[: len(text) - len(self._held)])

    def finish(self) -> str:
        """Return what is left when nothing more comes."""
        rest = self._shown(self._held + self._decoder.decode(b"", final=True))
        self._held = ""
        return rest + (self._end_of_line() if self._chars else "")

    def _shown(self, text: str) -> str:
        return "".join(self._part(part) for part in _PARTS.findall(text))

    def _part(self, part: str) -> str:
        if part == "\n":
            return self._end_of_line()
        if part == "\r":
            self._returned = True
            return ""
        before = "\r" if self._returned and self._terminal else ""
        if self._returned:
            self._begin_line()
        room = max(0, LINE_LIMIT - self._chars)
        self._chars += len(part)
        self._bytes += len(part.encode("utf-8", "replace"))
        shown = clean(part[:room], colour=self._colour)
        if self._terminal:
            return before + shown
        self._line.append(shown)
        return ""

    def _end_of_line(self) -> str:
        reset = "\x1b[0m" if self._colour else ""
        cut = f"{reset}… ({self._bytes:,} bytes)" if self._chars > LINE_LIMIT else ""
        line = "".join(self._line) + cut + "\n"
        self._begin_line()
        return line

    def _begin_line(self) -> None:
        self._line.clear()
        self._chars = self._bytes = 0
        self._returned = False
