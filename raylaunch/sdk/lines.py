"""Bytes of a log as lines of text."""

from __future__ import annotations

import codecs

LONGEST = 64 * 1024
"""Characters of a line that are held back for its end."""


class LineReader:
    """Takes bytes as they come and gives whole lines, without their ends; what is not UTF-8 is replaced."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that are whole now. Of a line without an end, no more than `LONGEST` is held."""
        *lines, self._held = (self._held + self._decoder.decode(data)).split("\n")
        if len(self._held) > LONGEST:
            lines.append(self._held)
            self._held = ""
        return [line.removesuffix("\r") for line in lines]

    def finish(self) -> list[str]:
        """Return what is left where nothing more comes."""
        left, self._held = self._held + self._decoder.decode(b"", final=True), ""
        self._decoder.reset()
        return [left] if left else []
