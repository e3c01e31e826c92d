"""Ray's log of an attempt that runs where no steward is: the training's own bytes, and what its runner told.

Pure. The same bytes give the same result, however they are cut: a reader that lost its place begins anew.
"""

from __future__ import annotations

import json
from typing import cast

from raylaunch.runner.contract import TOLD, Exit, Facts, Started

_TOLD = TOLD.encode()


class ToldLog:
    """Takes a log apart. Feed it all bytes in order.

    Attributes:
        read: how many bytes it was fed.
        begun: whether a runner began there.
    """

    def __init__(self) -> None:
        self.read = 0
        self.begun = False
        self._epoch = b""
        self._rest = b""
        self._kept: list[bytes] = []
        self._told: dict[str, dict[str, object]] = {}

    def feed(self, data: bytes, *, last: bool = False) -> bytes:
        """Return what is the training's: whole lines, and with `last` the rest.

        What Ray wrote before the runner began is left out, unless none ever began.
        """
        self.read += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self._is_told(line):
                self._kept.append(line + b"\n")
        if last:
            self._kept.append(self._rest)
            self._rest = b""
        if not self.begun and not last:
            return b""
        kept, self._kept = b"".join(self._kept), []
        return kept

    @property
    def started(self) -> Started | None:
        """Return what is known of the training's start."""
        return cast("Started | None", self._told.get("started"))

    @property
    def facts(self) -> Facts | None:
        """Return what the runner found."""
        return cast("Facts | None", self._told.get("facts"))

    @property
    def exit(self) -> Exit | None:
        """Return how the attempt ended, as its runner says."""
        return cast("Exit | None", self._told.get("exit"))

    @property
    def left(self) -> str:
        """Say what stays on the node, and where; empty when nothing does."""
        left = self._told.get("left", {})
        what = cast("list[str]", left.get("what") or [])
        return f"{', '.join(what)} in {left['folder']}" if what else ""

    def _is_told(self, line: bytes) -> bool:
        if not line.startswith(_TOLD):
            return False
        epoch, _, rest = line[len(_TOLD) :].partition(b" ")
        what, _, text = rest.partition(b" ")
        if self.begun and epoch != self._epoch:
            return False
        try:
            content = json.loads(text)
        except ValueError:
            return False
        if not isinstance(content, dict):
            return False
        if what == b"begin":
            self.begun, self._epoch, self._kept = True, epoch, []
        self._told[what.decode("utf-8", "replace")] = content
        return True
