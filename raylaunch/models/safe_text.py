"""Untrusted text and log bytes, made safe for terminals and agents: nothing moves the cursor, hides or floods."""

from __future__ import annotations

import codecs
import json
import logging
import re

LINE_LIMIT = 4000
"""How many characters of a line are shown."""

_COLOUR = re.compile(r"\x1b\[([0-9;:]*)m")
_VISIBLE = frozenset(
    {"", "0", "1", "2", "3", "4", "22", "23", "24", "39", *map(str, range(31, 38)), *map(str, range(90, 98))}
)
"""Colours and styles that a log may use. Those that can hide text are dropped: conceal, black, inverse, backgrounds."""
_OTHER_CSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-ln-~]")
_INVISIBLE = (
    r"\xad\u061c\u070f\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Invisible characters and those that change the direction of text, including tag characters and further variation
selectors; without joiners, which scripts and emoji need."""
_CONTROL = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{_INVISIBLE}]")
_SELECTORS = re.compile(r"[\U000e0100-\U000e01ef]")  # these alone count as printable
_UNFINISHED = re.compile(r"\x1b(\[[0-?]*[ -/]*)?\Z")
_PARTS = re.compile(r"\n|\r|[^\r\n]+")
_LONGEST_SEQUENCE = 32
_RESET = "\x1b[0m"
_RESETS = (_RESET, "\x1b[m")


def clean(text: str, *, colour: bool) -> str:
    r"""Return text without line ends that a terminal may show: other control characters are written as ``\x07``.

    Args:
        text: as it was decoded.
        colour: whether colour sequences stay; else they are dropped, as those that move the cursor always are.
    """
    if text.isprintable() and not _SELECTORS.search(text):
        return text
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        codes = [code for code in re.split("[;:]", match[1]) if code in _VISIBLE]
        if re.search(r"(^|[;:])[34]8[;:]", match[1]) or not codes:  # the numbers of a further colour are no codes
            return ""
        kept.append(f"\x1b[{';'.join(codes)}m")
        return "\ue000"

    text = text.replace("\ue000", "\ufffd")  # a private character that stands for a kept colour below
    text = _COLOUR.sub(keep if colour else "", text)
    text = _CONTROL.sub(_written, _OTHER_CSI.sub("", text))
    colours = iter(kept)
    return re.sub("\ue000", lambda _: next(colours), text) if kept else text


def one_line(text: str) -> str:
    """Return text as one clean line: line ends become spaces."""
    return clean(text.replace("\n", " "), colour=False)


def clean_lines(text: str, *, indent: str = "  ") -> str:
    """Return several lines, clean; those after the first are indented, so that none looks like output of raylaunch."""
    return f"\n{indent}".join(clean(line, colour=False) for line in text.split("\n"))


class CleanFormatter(logging.Formatter):
    """Formats log records and tracebacks, clean."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text without control characters."""
        return clean_lines(super().format(record))


def clean_json(text: str) -> str:
    """Return JSON text in which characters that are unsafe on a terminal are escaped."""
    return text if text.isascii() and "\x7f" not in text else _CONTROL.sub(_as_json, text)


def _as_json(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1]


def _written(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code <= 0xFF:  # noqa: PLR2004 -- one byte
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"  # noqa: PLR2004 -- two bytes


class LogView:
    """Turns the bytes of a log, piece by piece, into text to print. Memory is bounded, however long a line is.

    On a terminal, carriage returns of progress bars work, and a line shows while it is being written. Elsewhere only
    the last state of such a line is returned, when it ends.
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
        self._coloured = False

    def feed(self, data: bytes) -> str:
        """Return the text to print now."""
        text = self._held + self._decoder.decode(data)
        unfinished = _UNFINISHED.search(text, max(0, len(text) - _LONGEST_SEQUENCE))
        self._held = unfinished.group() if unfinished else ""
        return self._shown(text[: len(text) - len(self._held)])

    def finish(self) -> str:
        """Return the rest, at the end of the log."""
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
            self._start_line()
        room = max(0, LINE_LIMIT - self._chars)
        self._chars += len(part)
        self._bytes += len(part.encode("utf-8", "replace"))
        shown = clean(part[:room], colour=self._colour)
        self._coloured = self._colour and (self._coloured or "\x1b" in shown) and not shown.endswith(_RESETS)
        if self._terminal:
            return before + shown
        self._line.append(shown)
        return ""

    def _end_of_line(self) -> str:
        reset = _RESET if self._coloured else ""  # a colour ends with its line
        cut = f"… ({self._bytes:,} bytes)" if self._chars > LINE_LIMIT else ""
        line = f"{''.join(self._line)}{reset}{cut}\n"
        self._coloured = False
        self._start_line()
        return line

    def _start_line(self) -> None:
        self._line.clear()
        self._chars = self._bytes = 0
        self._returned = False
