"""Reading files on a node: logs by ranges, and the files of an attempt that are sent to the store.

No link leads out of an attempt's folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_module
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from raylaunch.agent.packages import file_sha256
from raylaunch.contract import (
    ATTEMPT,
    CHECKPOINTS,
    CLAIM,
    COLLECTED,
    EXIT,
    FACTS,
    LOGS,
    OUTPUTS,
    PROGRESS,
    STARTED,
    STOP,
    WANDB,
    WANDB_DATA,
)

READ_BYTES = 1024 * 1024
"""Most bytes of one read."""
TAIL_BYTES = 8 * 1024 * 1024
"""How far back a tail searches for its first line."""
KEPT_BY_JOB = (CHECKPOINTS, OUTPUTS)
"""Folders of a job, not of one attempt; the attempt's folder has links to them (`raylaunch.agent.job_dir`)."""
LINK = "link:"
"""Prefix of a link's target, in place of a file's checksum."""
_BLOCK = 64 * 1024
_RECORDS = (ATTEMPT, CLAIM, FACTS, STARTED, STOP, PROGRESS, COLLECTED, EXIT)
_WANDB_FILES = "files"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Slice:
    """Some bytes of a log: those from `offset` on, of a log of `size` bytes."""

    offset: int
    data: bytes
    size: int

    @property
    def next(self) -> int:
        """Where the next read starts."""
        return self.offset + len(self.data)


def size_of(path: Path) -> int:
    """Return the log's size in bytes; 0 before it exists."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read(path: Path, *, offset: int, limit: int = READ_BYTES) -> Slice:
    """Return at most `limit` bytes from `offset` on. A log that does not exist yet is an empty one."""
    size = size_of(path)
    start = min(max(offset, 0), size)
    if start == size:
        return Slice(start, b"", size)
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(min(limit, READ_BYTES))
    return Slice(start, data, max(size, start + len(data)))


def tail_offset(path: Path, lines: int, *, max_back: int = TAIL_BYTES) -> int:
    """Return where the last `lines` lines start, found backwards in blocks, at most `max_back` bytes before the end."""
    size = size_of(path)
    if lines <= 0 or size == 0:
        return size
    floor = max(0, size - max_back)
    with path.open("rb") as file:
        end, found = size, 0
        while end > floor:
            start = max(floor, end - _BLOCK)
            file.seek(start)
            block = file.read(end - start)
            if end == size and block.endswith(b"\n"):
                block = block[:-1]  # the end of the last line is not the start of another
            position = len(block)
            while (position := block.rfind(b"\n", 0, position)) >= 0:
                found += 1
                if found == lines:
                    return start + position + 1
            end = start
        return _at_character(file, floor)


def ray_log_path(logs: Path, submission: str) -> Path | None:
    """Return a submission's log; None when there is none.

    Args:
        logs: the folder ``logs`` of the session that Ray is in now. Each start of Ray makes a session next to the
            earlier ones, which keep the logs of jobs from before a restart.
        submission: the submission's id.
    """
    name = f"job-driver-{submission}.log"
    if "/" in name or "\0" in name:
        return None
    earlier = sorted(logs.parent.parent.glob("session_*/logs"), reverse=True)
    return next((folder / name for folder in (logs, *earlier) if FileStat.of(folder / name)), None)


def read_ray_log(logs: Path, submission: str, *, offset: int, tail: int | None, limit: int) -> Slice:
    """Return at most `limit` bytes of a submission's log: from `offset` on, or the last `tail` lines."""
    path = ray_log_path(logs, submission)
    if path is None:
        return Slice(0, b"", 0)
    return read(path, offset=offset if tail is None else tail_offset(path, tail), limit=limit)


def ray_log_size(logs: Path, submission: str) -> int:
    """Return the size of a submission's log in bytes; 0 when there is none."""
    path = ray_log_path(logs, submission)
    return size_of(path) if path is not None else 0


class FileStat(NamedTuple):
    """What shows whether a file changed. `link` is the relative target of a link."""

    size: int
    mtime_ns: int
    inode: int
    link: str = ""

    @classmethod
    def of(cls, path: Path | str) -> FileStat | None:
        """Inspect a path; None when it is not a regular file (a link is not)."""
        try:
            return cls._from(os.lstat(path))
        except OSError:
            return None

    @classmethod
    def of_descriptor(cls, descriptor: int) -> FileStat | None:
        """Inspect an open file; None when it is not a regular one."""
        return cls._from(os.fstat(descriptor))

    @classmethod
    def _from(cls, found: os.stat_result) -> FileStat | None:
        if not stat_module.S_ISREG(found.st_mode):
            return None
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


def is_append(path: str) -> bool:
    """Whether only what is new of a file needs to be sent: logs, W&B's file, reported progress."""
    if path.split("/", 1)[0] in KEPT_BY_JOB:
        return False
    return path == PROGRESS or path.endswith(".wandb") or (path.startswith(f"{LOGS}/") and path.endswith(".log"))


def quick_files(folder: Path, *, metrics: bool = True) -> Iterator[tuple[str, FileStat]]:
    """Yield the files that are checked many times a second: logs, W&B's file, the contract's records.

    Args:
        folder: The attempt's.
        metrics: Whether W&B's file and the reports are among them.
    """
    yield from _files_in(folder, LOGS)
    for run in _names(folder / WANDB / "wandb") if metrics else ():
        if "run-" in run and not (folder / WANDB / "wandb" / run).is_symlink():
            found = _files_in(folder, f"{WANDB}/wandb/{run}")
            yield from ((path, stat) for path, stat in found if path.endswith(".wandb"))
    for name in _RECORDS if metrics else tuple(name for name in _RECORDS if name != PROGRESS):
        stat = FileStat.of(f"{folder}/{name}")
        if stat is not None:
            yield name, stat


def slow_files(folder: Path, *, at_end: bool) -> Iterator[tuple[str, FileStat]]:
    """Yield outputs and checkpoints; and at the end what W&B keeps next to its files. Walks a whole tree."""
    base = job_folder_of(folder)
    if base is not None:
        yield from kept_files(base)
    for path, stat in _tree(folder, WANDB, skip="" if at_end else _WANDB_FILES):
        staged = at_end and path.startswith(f"{WANDB_DATA}/")
        if path.endswith(".wandb") or f"/{_WANDB_FILES}/" in path or staged:
            yield path, stat


def job_folder_of(folder: Path) -> Path | None:
    """Return the folder with an attempt's checkpoints and outputs: its job's, or its own if 0.1.0 created it.

    None if another attempt of the job has them now.
    """
    here = Path(os.path.realpath(folder))
    if not os.path.lexists(folder / CHECKPOINTS):
        return None
    if not (folder / CHECKPOINTS).is_symlink():
        return here
    job = Path(os.path.realpath(here.parent.parent / "jobs")) / here.name.rpartition("-")[0]
    return job if os.path.realpath(folder / CHECKPOINTS) == str(job / CHECKPOINTS) else None


def kept_files(base: Path) -> Iterator[tuple[str, FileStat]]:
    """Yield a job's checkpoints and outputs. Links among them are kept as links; those that lead out are left out.

    Args:
        base: the folder that has them, without links in its path.
    """
    for below in KEPT_BY_JOB:
        if (base / below).is_symlink():
            continue
        for parent, folders, names in os.walk(base / below):
            folders.sort()
            links = [name for name in folders if os.path.islink(f"{parent}/{name}")]  # noqa: PTH114 -- many files
            for name in sorted([*names, *links]):
                stat = _stat_kept(base, f"{parent}/{name}")
                if stat is not None:
                    yield os.path.relpath(f"{parent}/{name}", base), stat


def inventory(folder: Path, *, checksums: bool, known: dict[str, tuple[FileStat, str]]) -> dict[str, tuple[int, str]]:
    """Return size and checksum of every file of an ended attempt that belongs in the store.

    Args:
        folder: The attempt's folder; there may be none.
        checksums: Whether to read the files; otherwise the checksums are empty.
        known: Checksums found before; updated.
    """
    found: dict[str, tuple[int, str]] = {}
    for path, stat in {**dict(slow_files(folder, at_end=True)), **dict(quick_files(folder))}.items():
        if stat.link:
            found[path] = (stat.size, LINK + stat.link)
            continue
        if checksums and known.get(path, (None, ""))[0] != stat:
            with contextlib.suppress(OSError):
                known[path] = (stat, file_sha256(_resolve(folder, path)))
        found[path] = (stat.size, known[path][1] if checksums and path in known else "")
    return found


@contextlib.contextmanager
def open_regular(folder: Path, path: str) -> Iterator[int | None]:
    """Open a file of an attempt for reading; None when it no longer exists, or is a link that leads out."""
    try:
        descriptor = os.open(_resolve(folder, path), _READ)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def disk_use(root: Path) -> dict[str, int]:
    """Return the bytes of raylaunch's folders on a node, by what they hold; a file with several names counts once."""
    parts = {"environments": ("envs",), "packages": ("packages",), "attempts": ("attempts", "jobs")}
    seen: set[tuple[int, int]] = set()
    return {name: sum(_tree_bytes(root / folder, seen) for folder in folders) for name, folders in parts.items()}


def _at_character(file: BinaryIO, offset: int) -> int:
    """Return the next offset at which a UTF-8 character starts, if the text is UTF-8."""
    file.seek(offset)
    for skipped, byte in enumerate(file.read(4)):
        if byte & 0xC0 != 0x80:  # noqa: PLR2004 -- 10xxxxxx: a byte that continues a character (RFC 3629)
            return offset + skipped
    return offset


def _stat_kept(base: Path, path: str) -> FileStat | None:
    if not os.path.islink(path):  # noqa: PTH114 -- as above
        return FileStat.of(path)
    target = _target_of(base, path)
    return FileStat(len(os.fsencode(target)), 0, 0, target) if target else None


def _target_of(base: Path, path: str) -> str:
    """Return a link's target relative to its folder, without steps that another link could bend; empty outside."""
    where = os.path.dirname(path)  # noqa: PTH120 -- as above
    real = os.path.realpath(path)
    target = os.path.normpath(os.path.join(where, os.readlink(path)))  # noqa: PTH115, PTH118 -- as above
    if os.path.realpath(target) != real or not _kept_at(base, target):
        target = real
    return os.path.relpath(target, where) if _kept_at(base, real) and target != path else ""


def _kept_at(base: Path, path: str) -> bool:
    return any(path == str(base / name) or path.startswith(f"{base / name}/") for name in KEPT_BY_JOB)


def _resolve(folder: Path, path: str) -> Path:
    """Follow links as long as they stay in the folder."""
    if path.split("/", 1)[0] in KEPT_BY_JOB:
        base = job_folder_of(folder)
        if base is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return base / path
    found = folder / path
    if not found.is_symlink():
        return found
    target = Path(os.path.realpath(found))
    if not target.is_relative_to(os.path.realpath(folder)):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(found))
    return target


def _names(folder: Path) -> list[str]:
    if folder.is_symlink():
        return []
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 -- called many times a second
    except OSError:
        return []


def _files_in(folder: Path, below: str) -> Iterator[tuple[str, FileStat]]:
    for name in _names(folder / below):
        stat = FileStat.of(f"{folder}/{below}/{name}")
        if stat is not None:
            yield f"{below}/{name}", stat


def _tree(folder: Path, below: str, *, skip: str = "") -> Iterator[tuple[str, FileStat]]:
    if (folder / below).is_symlink():
        return
    for parent, folders, names in os.walk(folder / below):
        folders[:] = sorted(name for name in folders if name != skip)
        for name in sorted(names):
            path = os.path.relpath(os.path.join(parent, name), folder)  # noqa: PTH118 -- a Path for each file is slow
            stat = _stat_inside(folder, path)
            if stat is not None:
                yield path, stat


def _stat_inside(folder: Path, path: str) -> FileStat | None:
    try:
        return FileStat.of(_resolve(folder, path))
    except OSError:
        return None


def _tree_bytes(folder: Path, seen: set[tuple[int, int]]) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # deleted meanwhile
                facts = os.lstat(os.path.join(parent, name))  # noqa: PTH118 -- many files
                if (facts.st_dev, facts.st_ino) not in seen:
                    seen.add((facts.st_dev, facts.st_ino))
                    total += facts.st_size
    return total
