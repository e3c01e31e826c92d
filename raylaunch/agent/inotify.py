"""Notifications from the kernel when an attempt writes a line or a record, in place of polling fifty times a second.

Linux's inotify through ctypes: the standard library has no binding. Where it is not available (macOS, or the limit of
watches is reached) the node agent polls instead. Files on a network disk are watched too: writer and agent are on
the same node.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import Collection
from pathlib import Path

from raylaunch.contract import LOGS

_MODIFY, _MOVED_TO, _CREATE, _ONLY_FOLDERS = 0x2, 0x80, 0x100, 0x01000000
_RECORDS = _MOVED_TO | _CREATE | _ONLY_FOLDERS
"""Records are renamed or linked into place. What is modified there, heartbeat and reports, needs no check at once."""
_LINES = _MODIFY | _MOVED_TO | _CREATE | _ONLY_FOLDERS
_SOME_EVENTS = 64 * 1024
_GONE = frozenset({2, 20})
"""ENOENT, ENOTDIR."""


class Watcher:
    """Reports possible changes in the attempts below a node root: a log that grew, a record, a new attempt."""

    def __init__(self, root: Path) -> None:
        self._attempts = root / "attempts"
        self._known: frozenset[str] = frozenset()
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self._descriptor = self._libc.inotify_init1(flags) if self._libc is not None else -1
        self.works = self._watch(self._attempts, _RECORDS)
        """Whether the kernel notifies; otherwise files have to be polled."""

    def follow(self, attempts: Collection[str]) -> None:
        """Watch these attempts; the kernel drops deleted ones itself."""
        wanted = frozenset(attempts)
        for attempt in wanted - self._known:
            folder = self._attempts / attempt
            self.works &= self._watch(folder, _RECORDS) and self._watch(folder / LOGS, _LINES)
        self._known = wanted

    def drain(self) -> None:
        """Drop the events so far: the next check of the files sees their changes."""
        with contextlib.suppress(BlockingIOError):
            while self.works and len(os.read(self._descriptor, _SOME_EVENTS)) > _SOME_EVENTS // 2:
                continue

    async def wait_for_events(self, wake: asyncio.Event, timeout_s: float) -> None:
        """Return on an event, when `wake` is set, or at the timeout."""
        loop = asyncio.get_running_loop()
        if self.works:
            loop.add_reader(self._descriptor, wake.set)
        try:
            await asyncio.wait_for(wake.wait(), timeout_s)
        except asyncio.TimeoutError:
            return
        finally:
            if self.works:
                loop.remove_reader(self._descriptor)

    def _watch(self, folder: Path, mask: int) -> bool:
        """Watch a folder; one that does not exist counts as watched. Return whether that is possible."""
        if self._libc is None or self._descriptor < 0:
            return False
        if self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), mask) >= 0:
            return True
        return ctypes.get_errno() in _GONE
