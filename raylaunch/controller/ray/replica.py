"""The store's replica of the files that attempts write on their nodes. Only this module writes replicated bytes.

A growing file is appended at its size on disk; a complete file is written to a temporary one, verified, and renamed.
`.replicated.json` in an attempt's folder lists the complete files, so that nothing is sent twice. A file that is
unchanged since the previous attempt is a hard link to that attempt's file; links among checkpoints and outputs are
kept as links.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from raylaunch.agent.attempt_files import KEPT_BY_JOB, LINK, is_append
from raylaunch.agent.change_feed import Chunk, Have, HaveFile
from raylaunch.agent.packages import file_sha256
from raylaunch.controller.ray.protocol import BridgeEvent, Grew, Stored
from raylaunch.files import sync, write_atomic

REPLICATED = ".replicated.json"
PRESENT = f".present{REPLICATED}"
"""Lists the files that an attempt had when it ended; its program had deleted all others."""
_PART = ".raylaunch-part"
_SAVE_S = 1.0


class GapError(Exception):
    """A chunk does not continue the file on disk: start again from its actual size."""


class ReplicaStore:
    """The attempts' files in one store. One thread at a time changes it; others may compare files."""

    def __init__(self, store: Path) -> None:
        self._jobs = store / "jobs"
        self._whole: dict[str, dict[str, HaveFile]] = {}
        self._digests: dict[Path, hashlib._Hash] = {}
        self._grown: dict[Path, tuple[int, int, str]] = {}
        self._unsaved: dict[str, float] = {}
        self._changed: dict[str, set[str]] = {}
        """Files that only appeared to be unchanged since the previous attempt."""
        self._before: dict[str, tuple[Path, dict[str, HaveFile]]] = {}
        """Folder, checkpoints and outputs of the previous attempt."""

    def folder(self, attempt: str) -> Path:
        """Return the folder of an attempt: ``jobs/<job>/attempt-<n>``."""
        job, _, number = attempt.rpartition("-")
        return self._jobs / job / f"attempt-{number}"

    def wanted(self, attempt: str) -> bool:
        """Whether the store has the attempt's job; files of a removed job are not copied."""
        return self.folder(attempt).parent.is_dir()

    def have(self, attempts: list[str]) -> Have:
        """Return which files of some attempts are on disk."""
        return {attempt: dict(self._have_of(attempt)) for attempt in attempts if self.wanted(attempt)}

    def write(self, chunk: Chunk) -> list[BridgeEvent]:
        """Write one chunk. May be repeated after a failure.

        Raises:
            GapError: The chunk does not continue the file, or the file's checksum differs.
            OSError: The store cannot be written; the files are unchanged.
        """
        if not self.wanted(chunk.attempt):
            return []
        path = self._path(chunk.attempt, chunk.path)
        if _kept(chunk.path):
            _make_way(self.folder(chunk.attempt), chunk.path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if chunk.mode == "same":
            return self._write_same(path, chunk)
        if chunk.mode == "link":
            return self._write_link(path, chunk)
        if chunk.mode == "append":
            _write_at(path, chunk.offset, chunk.data)
            return [Grew(attempt=chunk.attempt, path=chunk.path, size=chunk.offset + len(chunk.data))]
        return self._write_whole(path, chunk)

    def save(self, *, at_once: bool = False) -> None:
        """Save the list of complete files; by default at most once a second.

        Raises:
            OSError: The store cannot be written.
        """
        now = time.monotonic()
        for attempt, since in list(self._unsaved.items()):
            if not at_once and now - since < _SAVE_S:
                continue
            folder = self.folder(attempt)
            if self.wanted(attempt) and folder.is_dir():
                self._write_json(attempt, REPLICATED, self._whole.get(attempt, {}))
            del self._unsaved[attempt]

    def missing(self, attempt: str, sizes: Mapping[str, int]) -> list[str]:
        """Return the files whose size in the store differs from `sizes`."""
        folder = self.folder(attempt)
        return [path for path, size in sizes.items() if _size(folder / path) != size]

    def differing(self, attempt: str, checksums: Mapping[str, str]) -> list[str]:
        """Return the files whose content in the store differs from `checksums`; reads those that grew."""
        return [path for path, sha256 in checksums.items() if self._sha256(attempt, path) != sha256]

    def drop(self, attempt: str, paths: list[str]) -> None:
        """Delete files that differ, so that they are sent again from the start."""
        for path in paths:
            self._path(attempt, path).unlink(missing_ok=True)
            self._whole.get(attempt, {}).pop(path, None)
            self._changed.setdefault(attempt, set()).add(path)
            self._unsaved.setdefault(attempt, 0.0)

    def sync(self, attempt: str, paths: list[str]) -> None:
        """Flush an attempt's files to disk (fsync).

        Raises:
            OSError: The disk failed.
        """
        folder = self.folder(attempt)
        for path in paths:
            _sync(folder / path)
        for each in {(folder / path).parent for path in paths}:
            _sync(each)

    def finalize(self, attempt: str, checksums: Mapping[str, str]) -> list[BridgeEvent]:
        """Save the lists of files, and return events with the checksums of the files that grew.

        Raises:
            OSError: The store cannot be written.
        """
        folder = self.folder(attempt)
        self._unsaved.setdefault(attempt, 0.0)
        self.save(at_once=True)
        self._write_json(attempt, PRESENT, sorted(checksums))
        _sync(folder)
        return [
            Stored(attempt=attempt, path=path, size=_size(folder / path) or 0, sha256=sha256)
            for path, sha256 in checksums.items()
            if is_append(path)
        ]

    def forget(self, attempt: str) -> None:
        """Drop the cached state of an attempt; its files stay."""
        self._whole.pop(attempt, None)
        self._unsaved.pop(attempt, None)
        self._changed.pop(attempt, None)
        self._before.pop(attempt, None)
        folder = self.folder(attempt)
        for path in list(self._grown):  # a copy: files may be compared meanwhile
            if path.is_relative_to(folder):
                self._grown.pop(path, None)

    def _write_json(self, attempt: str, name: str, value: object) -> None:
        folder = self.folder(attempt)
        if not folder.is_dir():
            return
        write_atomic(folder / name, json.dumps(value), durable=False, only_writer=True)

    def _have_of(self, attempt: str) -> Iterator[tuple[str, HaveFile]]:
        folder = self.folder(attempt)
        if attempt not in self._whole:
            self._whole[attempt] = _read_replicated(folder / REPLICATED)
        for path, have in self._whole[attempt].items():
            if _size(folder / path) == have.size:
                yield path, have
        self._before[attempt] = self._of_before(attempt)
        for path, have in self._before[attempt][1].items():
            if path not in self._whole[attempt] and path not in self._changed.get(attempt, ()):
                yield path, have._replace(before=True)
        for parent, _, names in os.walk(folder):
            for name in names:
                path = os.path.relpath(os.path.join(parent, name), folder)  # noqa: PTH118 -- many files
                size = _size(folder / path)
                if is_append(path) and size is not None:
                    yield path, HaveFile(size)

    def _of_before(self, attempt: str) -> tuple[Path, dict[str, HaveFile]]:
        """Return folder, checkpoints and outputs of the latest earlier attempt that has files here."""
        job, _, number = attempt.rpartition("-")
        for n in range(int(number) - 1, 0, -1):
            folder = self.folder(f"{job}-{n}")
            if (folder / REPLICATED).is_file():
                found = _read_replicated(folder / REPLICATED).items()
                return folder, {
                    path: have
                    for path, have in found
                    if _kept(path) and not have.sha256.startswith(LINK) and _size(folder / path) == have.size
                }
        return self.folder(attempt), {}

    def _write_same(self, path: Path, chunk: Chunk) -> list[BridgeEvent]:
        """Link to the previous attempt's file."""
        folder, known = self._before.get(chunk.attempt, (path, {}))
        have = known.get(chunk.path)
        if have is None or have.sha256 != chunk.sha256 or _size(folder / chunk.path) != have.size:
            msg = f"the previous attempt has no such {path}"
            raise GapError(msg)
        part = path.with_name(f".{path.name[:180]}{_PART}")
        part.unlink(missing_ok=True)
        try:
            os.link(folder / chunk.path, part, follow_symlinks=False)
        except OSError:  # a file system without hard links, or too many of one file
            shutil.copy2(folder / chunk.path, part, follow_symlinks=False)
        part.replace(path)
        return self._record(chunk)

    def _write_link(self, path: Path, chunk: Chunk) -> list[BridgeEvent]:
        target = chunk.sha256[len(LINK) :]
        parts = PurePosixPath(target).parts
        where = posixpath.normpath(posixpath.join(posixpath.dirname(chunk.path), target))
        climbs = ".." in parts[next((at for at, part in enumerate(parts) if part != ".."), len(parts)) :]
        if not target or "\0" in target or climbs or not _kept(where):
            msg = f"{chunk.path!r} is a link to {target!r}, which leads out"
            raise ValueError(msg)
        part = path.with_name(f".{path.name[:180]}{_PART}")
        part.unlink(missing_ok=True)
        part.symlink_to(target)
        part.replace(path)
        self._record(chunk)
        return []

    def _record(self, chunk: Chunk) -> list[BridgeEvent]:
        have = HaveFile(chunk.size, chunk.mtime_ns, chunk.sha256)
        self._whole.setdefault(chunk.attempt, {})[chunk.path] = have
        self._unsaved.setdefault(chunk.attempt, time.monotonic())
        return [Stored(attempt=chunk.attempt, path=chunk.path, size=have.size, sha256=have.sha256)]

    def _write_whole(self, path: Path, chunk: Chunk) -> list[BridgeEvent]:
        part = path.with_name(f".{path.name[:180]}{_PART}")
        if chunk.offset == 0:
            part.unlink(missing_ok=True)
            self._digests[part] = hashlib.sha256()
        digest = self._digests.get(part)
        if digest is None:
            msg = f"{part} has no first chunk"
            raise GapError(msg)
        _write_at(part, chunk.offset, chunk.data)
        digest.update(chunk.data)
        if not chunk.final:
            return []
        del self._digests[part]
        if digest.hexdigest() != chunk.sha256:
            part.unlink(missing_ok=True)
            msg = f"the checksum of {part} differs from the expected one"
            raise GapError(msg)
        part.replace(path)
        return self._record(chunk)

    def _sha256(self, attempt: str, path: str) -> str:
        where = self.folder(attempt) / path
        try:
            stat = where.lstat()
        except OSError:
            return ""
        whole = self._whole.get(attempt, {}).get(path)
        if whole is not None and whole.size == stat.st_size and not is_append(path):
            return whole.sha256
        known = self._grown.get(where)
        if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
            known = self._grown[where] = (stat.st_size, stat.st_mtime_ns, file_sha256(where))
        return known[2]

    def _path(self, attempt: str, path: str) -> Path:
        """Return where a file from a node is stored; a path out of the attempt's folder is a bug or an attack.

        Nothing is written below a link; one in the place of checkpoints or outputs is replaced.
        """
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\0" in path:
            msg = f"{path!r} is not a path in an attempt's folder"
            raise ValueError(msg)
        folder = self.folder(attempt)
        where = folder
        for part in parts:
            where /= part
            if where.is_symlink() and not (_kept(path) and where.parent != folder):
                msg = f"{where} is a link, where the store has none"
                raise ValueError(msg)
        return where


def _kept(path: str) -> bool:
    return path.split("/", 1)[0] in KEPT_BY_JOB


def _make_way(folder: Path, path: str) -> None:
    """Delete a file or link that is a folder on the node by now, or the reverse."""
    where = folder
    for part in PurePosixPath(path).parts[:-1]:
        where /= part
        if where.is_symlink() or where.is_file():
            where.unlink()
    where /= PurePosixPath(path).name
    if where.is_dir() and not where.is_symlink():
        shutil.rmtree(where)


def _write_at(path: Path, offset: int, data: bytes) -> None:
    """Append to a file at `offset`, which must be its size; after a failure it has that size again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size != offset:
            msg = f"{path} has {os.fstat(descriptor).st_size} bytes, but the chunk starts at {offset}"
            raise GapError(msg)
        view = memoryview(data)
        try:
            while view:
                view = view[os.pwrite(descriptor, view, offset + len(data) - len(view)) :]
        except OSError:
            os.ftruncate(descriptor, offset)
            raise
    finally:
        os.close(descriptor)


def _size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None


def _read_replicated(path: Path) -> dict[str, HaveFile]:
    try:
        known = json.loads(path.read_bytes())
        return {str(name): HaveFile(*entry) for name, entry in known.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _sync(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        sync(path)
