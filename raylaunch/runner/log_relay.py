"""The copy of the training's output that goes to Ray's own driver log, in a form that Ray's log tools can handle.

They end a follow on a byte that is not UTF-8 or a very long line, and read a whole log to show its end. The attempt's
own log keeps every byte; this copy has valid UTF-8, lines of at most 16 KiB, one line where a progress bar drew many
times, and at most `contract.RAY_LOG_LIMIT` bytes.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from raylaunch import contract

LINE_LIMIT = 16 * 1024
_BLOCK = 256 * 1024
_POLL_S = 0.1


class LineFilter:
    """Converts blocks of bytes to lines for Ray's log tools. It never holds more than one block and one line."""

    def __init__(self) -> None:
        self._part = b""
        self._cut = 0

    def feed(self, block: bytes) -> bytes:
        """Return what can be shown after this block: whole lines."""
        *whole, rest = block.split(b"\n")
        out = []
        for line in whole:
            out.append(self._line(self._part + line))
            self._part, self._cut = b"", 0
        self._part += rest
        if len(self._part) > LINE_LIMIT:
            self._shorten()
        return b"".join(out)

    def finish(self) -> bytes:
        """Return the last line, which had no end."""
        if not self._part:
            return b""
        line, self._part = self._line(self._part), b""
        self._cut = 0
        return line

    def _shorten(self) -> None:
        """Shorten an unfinished line to what would be shown of it."""
        drawn = self._part.rstrip(b"\r").rpartition(b"\r")
        if drawn[1]:
            self._part, self._cut = drawn[2], 0
        if len(self._part) > LINE_LIMIT:
            self._cut += len(self._part) - LINE_LIMIT
            self._part = self._part[:LINE_LIMIT]

    def _line(self, line: bytes) -> bytes:
        if b"\r" in line:
            line = line.rstrip(b"\r").rpartition(b"\r")[2]
        cut = self._cut + max(0, len(line) - LINE_LIMIT)
        text = line[:LINE_LIMIT].decode("utf-8", "replace").encode()
        if cut:
            text += f" [… {cut} more bytes of this line are in the job's log: raylaunch logs]".encode()
        return text + b"\n"


class LogRelay:
    """Follows the attempt's log in a thread and copies it to a file descriptor."""

    def __init__(self, log: Path, out: int, *, job: str, limit: int = contract.RAY_LOG_LIMIT) -> None:
        self._log = log
        self._out = out
        self._left = limit
        self._offset = 0
        self._rest = f"raylaunch: the rest of the output is in: raylaunch logs {job}\n".encode()
        self._filter = LineFilter()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start, or continue after `finish`."""
        self._ending.clear()
        self._thread = threading.Thread(target=self._follow, name="relay", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float) -> None:
        """Copy what is there and end the thread; a reader that blocks cannot delay this longer than `timeout_s`."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _follow(self) -> None:
        try:
            with self._log.open("rb") as log:
                log.seek(self._offset)
                while self._left > 0:
                    last = self._ending.is_set()
                    block = log.read(_BLOCK)
                    self._offset += len(block)
                    if block:
                        self._write(self._filter.feed(block))
                    elif last:
                        self._write(self._filter.finish())
                        return
                    else:
                        self._ending.wait(_POLL_S)
        except OSError:
            return  # the reader has closed our output; the attempt's log is complete

    def _write(self, data: bytes) -> None:
        if len(data) > self._left:
            data = data[: data.rfind(b"\n", 0, self._left) + 1] + self._rest
            self._left = 0
        else:
            self._left -= len(data)
        while data:
            data = data[os.write(self._out, data) :]
