"""Changes of the attempts' files since they were last sent: the node agent's side of replication.

Ways to send a file. ``append``: logs, W&B's file and reported progress grow, and only what is new is sent.
``replace``: everything else is sent completely, with its checksum, once it no longer changes. ``same``: the receiver
has it from the previous attempt, and nothing is sent. ``link``: a link's target. The receiver reports once what it has
(`Have`); from then on this side remembers what it has sent. Whenever either side is in doubt, the receiver starts
again from what is on its disk.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, cast

from raylaunch.agent.attempt_dir import attempts_in, read_claim, read_json
from raylaunch.agent.attempt_files import LINK, FileStat, is_append, open_regular, quick_files, slow_files
from raylaunch.agent.processes import runner_alive
from raylaunch.contract import CLAIM, EXIT, FACTS, STARTED, Claim

QUICK_BUDGET = 6 * 1024 * 1024
BUDGET = 8 * 1024 * 1024
PIECE = 4 * 1024 * 1024

_REST_S = 2.0
_SLOW_CHECK_S = 1.0
_IDLE_CHECK_S = 5.0


class HaveFile(NamedTuple):
    """What the receiver has of one file. For an ``append`` file only `size` counts."""

    size: int
    mtime_ns: int = 0
    sha256: str = ""
    before: bool = False
    """Whether it is the previous attempt's file, which this attempt may have deleted."""


Have = dict[str, dict[str, HaveFile]]
"""By attempt and path."""


class Chunk(NamedTuple):
    """Some bytes of one file, or with ``same`` and ``link`` none."""

    attempt: str
    path: str
    mode: Literal["append", "replace", "same", "link"]
    size: int
    """Of the file: after this chunk with ``append``, else of the whole."""
    mtime_ns: int
    offset: int = 0
    data: bytes = b""
    final: bool = True
    """With a ``replace``: these are the last bytes, and `sha256` is that of the whole."""
    sha256: str = ""
    """Of a link: see `LINK`."""


class AttemptFacts(TypedDict):
    """What is observed of one attempt."""

    attempt: str
    claim: dict[str, object] | None
    started: dict[str, object] | None
    facts: dict[str, object] | None
    exit: dict[str, object] | None
    runner_alive: bool


class ChangeReply(TypedDict):
    """What changed. `resync` asks the receiver to start a new session."""

    resync: bool
    chunks: list[Chunk]
    attempts: list[AttemptFacts]
    live: bool
    """Whether an attempt is running, so that frequent checks are worthwhile."""


@dataclass
class _Sending:
    """A file that is being sent completely, in several replies."""

    stat: FileStat
    offset: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


@dataclass
class _Attempt:
    """One attempt as one receiver knows it."""

    have: dict[str, HaveFile]
    sending: dict[str, _Sending] = field(default_factory=dict)
    inodes: dict[str, int] = field(default_factory=dict)
    facts: AttemptFacts | None = None
    json_seen: tuple[object, ...] = ()
    slow: dict[str, FileStat] = field(default_factory=dict)
    next_slow: float = 0.0
    next_check: float = 0.0
    ended: bool = False


class ChangeFeed:
    """Finds what has to be sent. One receiver at a time: the latest that started a session. Threads may share it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._session = ""
        self._attempts: dict[str, _Attempt] = {}
        self._expected: dict[str, dict[str, HaveFile]] = {}

    def expect(self, attempt: str, have: Mapping[str, HaveFile]) -> None:
        """Remember what the receiver has for an attempt that is about to be created: the previous attempt's files."""
        with self._lock:
            self._expected[attempt] = dict(have)

    def take(self, session: str, have: Have | None, *, metrics: bool = True) -> ChangeReply:
        """Return what changed since the last call, at most about `BUDGET` bytes; possibly nothing. Does not wait.

        Args:
            session: The receiver's name for its sequence of calls.
            have: What the receiver has, in the first call of a session; None in those that follow.
            metrics: Whether to check W&B's file and the reports of running attempts; they may grow with each step.
        """
        with self._lock:
            if have is not None:
                self._session = session
                self._attempts = {attempt: _Attempt(have=dict(files)) for attempt, files in have.items()}
            elif session != self._session:
                return ChangeReply(resync=True, chunks=[], attempts=[], live=True)
            return self._take(metrics=metrics)

    def check_again(self, attempt: str) -> None:
        """Check an ended attempt in the next call, and not seconds later."""
        with self._lock:
            if attempt in self._attempts:
                self._attempts[attempt].next_check = 0.0

    def _take(self, *, metrics: bool) -> ChangeReply:
        names = attempts_in(self._root)
        for gone in self._attempts.keys() - set(names):
            del self._attempts[gone]
        reply = ChangeReply(resync=False, chunks=[], attempts=[], live=False)
        left = BUDGET
        now = time.monotonic()
        for name in names:
            if name not in self._attempts:
                self._attempts[name] = _Attempt(have=self._expected.get(name, {}))
            self._expected.pop(name, None)
            known = self._attempts[name]
            folder = self._root / "attempts" / name
            reply["live"] = reply["live"] or not known.ended
            if known.ended and now < known.next_check:
                continue
            known.next_check = now + _IDLE_CHECK_S
            before = len(reply["chunks"])
            for chunk in self._chunks_of(name, folder, known, left, metrics=metrics or known.ended):
                left -= len(chunk.data)
                reply["chunks"].append(chunk)
            facts = _facts_of(name, folder, known)
            if facts != known.facts:
                reply["attempts"].append(facts)
                known.facts = facts
            claimed = facts["claim"] is not None
            known.ended = facts["exit"] is not None or (claimed and not facts["runner_alive"])
            if len(reply["chunks"]) > before or known.sending or left <= 0:
                known.next_check = now
        return reply

    def _chunks_of(self, name: str, folder: Path, known: _Attempt, budget: int, *, metrics: bool) -> Iterator[Chunk]:
        left = min(budget, QUICK_BUDGET)
        for path, stat in quick_files(folder, metrics=metrics):
            for chunk in _send(name, folder, path, stat, known, left):
                left -= len(chunk.data)
                budget -= len(chunk.data)
                yield chunk
        now = time.monotonic()
        if now >= known.next_slow or known.ended:
            known.slow = dict(slow_files(folder, at_end=known.ended))
            spent = time.monotonic() - now
            known.next_slow = now + max(_SLOW_CHECK_S, 20 * spent)
        for path, stat in known.slow.items():
            if budget <= 0:
                return
            if not known.ended and time.time_ns() - stat.mtime_ns < _REST_S * 1e9:
                continue
            for chunk in _send(name, folder, path, stat, known, budget):
                budget -= len(chunk.data)
                yield chunk


def _send(name: str, folder: Path, path: str, stat: FileStat, known: _Attempt, budget: int) -> Iterator[Chunk]:  # noqa: PLR0913, PLR0917
    """Yield what has to be sent of one file now, and remember it as sent."""
    if budget <= 0:
        return
    have = known.have.get(path)
    if have is not None and have.before:
        del known.have[path]
        if not stat.link and _same(path, have, stat):
            known.have[path] = have._replace(before=False)
            yield Chunk(name, path, "same", have.size, have.mtime_ns, sha256=have.sha256)
            return
        have = None
    if stat.link:
        if have is None or have.sha256 != LINK + stat.link:
            known.have[path] = HaveFile(stat.size, 0, LINK + stat.link)
            yield Chunk(name, path, "link", stat.size, 0, sha256=LINK + stat.link)
        return
    if is_append(path) and path not in known.sending and not _restarted(path, stat, have, known):
        yield from _send_growth(name, folder, path, stat, known, budget)
        return
    if path not in known.sending and have is not None and _same(path, have, stat):
        return
    yield from _send_whole(name, folder, path, stat, known, budget)


def _same(path: str, have: HaveFile, stat: FileStat) -> bool:
    return not is_append(path) and (have.size, have.mtime_ns) == (stat.size, stat.mtime_ns)


def _restarted(path: str, stat: FileStat, have: HaveFile | None, known: _Attempt) -> bool:
    """Whether a file that should only grow was truncated or replaced by its program."""
    inode = known.inodes.setdefault(path, stat.inode)
    return have is not None and (stat.size < have.size or inode != stat.inode)


def _send_growth(  # noqa: PLR0913, PLR0917
    name: str, folder: Path, path: str, stat: FileStat, known: _Attempt, budget: int
) -> Iterator[Chunk]:
    offset = known.have.get(path, HaveFile(0)).size
    if stat.size <= offset and path in known.have:
        return
    with open_regular(folder, path) as descriptor:
        while budget > 0 and descriptor is not None:
            data = os.pread(descriptor, min(PIECE, budget, max(stat.size - offset, 0)), offset)
            known.have[path] = HaveFile(offset + len(data))
            yield Chunk(name, path, "append", offset + len(data), stat.mtime_ns, offset, data, final=False)
            offset += len(data)
            budget -= len(data)
            if not data or offset >= stat.size:
                return


def _send_whole(  # noqa: PLR0913, PLR0917
    name: str, folder: Path, path: str, stat: FileStat, known: _Attempt, budget: int
) -> Iterator[Chunk]:
    sending = known.sending.setdefault(path, _Sending(stat))
    with open_regular(folder, path) as descriptor:
        now = FileStat.of_descriptor(descriptor) if descriptor is not None else None
        grows = is_append(path)
        if now is None or (now != sending.stat and not (grows and now.inode == sending.stat.inode)):
            del known.sending[path]
            return
        while budget > 0 and descriptor is not None:
            size = sending.stat.size
            data = os.pread(descriptor, min(PIECE, budget, size - sending.offset), sending.offset)
            offset, sending.offset = sending.offset, sending.offset + len(data)
            sending.digest.update(data)
            budget -= len(data)
            final = sending.offset >= size
            if final and not grows and FileStat.of_descriptor(descriptor) != sending.stat:
                del known.sending[path]
                return
            if not data and not final:
                del known.sending[path]
                return
            sha256 = sending.digest.hexdigest() if final else ""
            if final:
                known.have[path] = HaveFile(size, sending.stat.mtime_ns, sha256)
                known.inodes[path] = sending.stat.inode
                del known.sending[path]
            yield Chunk(name, path, "replace", size, sending.stat.mtime_ns, offset, data, final, sha256)
            if final:
                return


def _facts_of(name: str, folder: Path, known: _Attempt) -> AttemptFacts:
    """Read the contract's small files again when one of them changed."""
    seen = tuple(FileStat.of(f"{folder}/{file}") for file in (CLAIM, STARTED, FACTS, EXIT))
    if known.facts is not None and seen == known.json_seen:
        return {**known.facts, "runner_alive": runner_alive(cast("Claim | None", known.facts["claim"]))}
    claim = read_claim(folder)
    found = AttemptFacts(
        attempt=name,
        claim=dict(claim) if claim is not None else None,
        started=read_json(folder / STARTED),
        facts=read_json(folder / FACTS),
        exit=read_json(folder / EXIT),
        runner_alive=runner_alive(claim),
    )
    read = (found["claim"], found["started"], found["facts"], found["exit"])
    half_written = any(stat is not None and value is None for stat, value in zip(seen, read, strict=True))
    known.json_seen = () if half_written else seen
    return found
