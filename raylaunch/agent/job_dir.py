"""Folders of jobs and attempts on a node: preparing an attempt, and the checkpoints and outputs of its job.

``<node root>/jobs/<job>/checkpoints`` and ``outputs`` are the same for each attempt of the job; the attempt's folder
has links to them. On a worker ``jobs`` is a link to the cluster's folder, so that the path is the same on every host.
``writer.json`` names the attempt that wrote there last, and its node root, so that no older one writes there
again, and that a copy which is older than the store's is replaced. Several machines may have one disk, by NFS: an older
attempt whose runner is on another machine is stopped by that runner, on request, before a newer one starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from raylaunch.agent.attempt_dir import (
    attempt_folder,
    attempts_in,
    beat_at,
    close,
    read_claim,
    read_json,
    request_stop,
    write_file,
    write_json,
)
from raylaunch.agent.attempt_files import KEPT_BY_JOB, LINK, FileStat, kept_files
from raylaunch.agent.packages import link_wheels
from raylaunch.agent.processes import end_processes
from raylaunch.contract import (
    ATTEMPT,
    CODE,
    COLLECTED,
    EXIT,
    FENCED,
    LEFT,
    LEFT_S,
    LOGS,
    RUNNER,
    SECRETS,
    TMP,
    WANDB,
    WHEELS,
    WRITER,
    AttemptSpec,
    StopWish,
)
from raylaunch.errors import ClusterError, ConflictError, NotFoundError, TransferError
from raylaunch.files import sha256_of
from raylaunch.runner.processes import is_this_boot

_PART = ".raylaunch-part"
_OTHER_MACHINE_S = 60.0
_SILENT_S = 20.0
"""Without a heartbeat for so long a runner on another machine is dead: it beats once a second."""
_POLL_S = 0.2
_FICLONE = 0x40049409


def prepare(  # noqa: PLR0913 -- what an attempt consists of
    root: Path, *, spec: AttemptSpec, package: Path | None, secrets: Mapping[str, str], runner: bytes, python: str
) -> ReadyAttempt:
    """Create an attempt's folder. May be repeated; once a runner has claimed the attempt, nothing changes.

    Args:
        root: The node root.
        spec: Becomes ``attempt.json``, written last.
        package: The unpacked package, of which the attempt gets its own copy; None for no code.
        secrets: Values by name; become ``secrets.json``, which the runner deletes.
        runner: Bytes of the runner's zip.
        python: The interpreter that runs it.

    Raises:
        ConflictError: The attempt was fenced, or a newer one of its job is here.
        ClusterError: A process of an older attempt of its job cannot be ended.
        OSError: The disk is full.
    """
    folder = attempt_folder(root, spec["attempt"])
    ready = ReadyAttempt(folder=str(folder), command=shlex.join([python, "-I", str(folder / RUNNER), str(folder)]))
    claim = read_claim(folder)
    if claim is not None and claim["epoch"] == FENCED:
        msg = f"the attempt {spec['attempt']} was stopped on this node before it started"
        raise ConflictError(msg)
    if claim is not None:
        return ready
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    job_dir = str(take(root, spec["attempt"], spec["tag"]))
    for name in (LOGS, WANDB, TMP):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    _copy_code(package, folder / CODE)
    link_wheels(root / "packages", spec["wheels"], folder / WHEELS)
    write_file(folder / RUNNER, runner)
    write_json(folder / SECRETS, secrets)
    envs = spec["envs_dir"] or str(root / "envs")
    moved_from = spec["moved_from"] if spec["moved_from"] != job_dir else ""
    write_json(folder / ATTEMPT, {**spec, "envs_dir": envs, "job_dir": job_dir, "moved_from": moved_from})
    return ready


def forget(root: Path, attempt: str, *, again: bool = False) -> None:
    """Delete an attempt's folder. May be repeated.

    Args:
        root: The node root.
        attempt: Its id.
        again: Another attempt follows, which starts with the checkpoints and outputs of this one.
    """
    if not again:
        drop(root, attempt)
    folder = attempt_folder(root, attempt)
    removed = folder.with_name(f".forgotten-{attempt}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


class ReadyAttempt(NamedTuple):
    """An attempt is ready on its node; `command` is its entrypoint for Ray."""

    folder: str
    command: str


class LeftPiece(NamedTuple):
    """A piece of an output that was not kept, with size and time of the complete file."""

    data: bytes
    size: int
    mtime_ns: int


class StoredFile(NamedTuple):
    """One file as the store has it; a link has its target after `LINK` in place of a checksum."""

    size: int
    mtime_ns: int
    sha256: str


def job_folder(root: Path, attempt: str) -> Path:
    """Return the folder of an attempt's job below a node root: without links, as programs record it."""
    return Path(os.path.realpath(root / "jobs")) / attempt_folder(root, attempt).name.rpartition("-")[0]


def last_writer(root: Path, attempt: str) -> int:
    """Return the number of the attempt whose files an attempt's job has here; 0 where there are none, or not all."""
    n = (read_json(job_folder(root, attempt) / WRITER) or {}).get("n")
    return n if isinstance(n, int) else 0


def take(root: Path, attempt: str, tag: str, *, other_machine_s: float = _OTHER_MACHINE_S) -> Path:
    """Give the job's folder to an attempt, and return it. May be repeated.

    Older attempts of the job are closed first, and their processes ended: nothing else writes there from now on.

    Args:
        root: the node root.
        attempt: the one that is about to start here.
        tag: its value of `raylaunch.contract.VAR_ATTEMPT`.
        other_machine_s: how long an older attempt on another machine with the same root may take to end.

    Raises:
        ConflictError: a newer attempt has it.
        ClusterError: a process of an older attempt cannot be ended, or its runner on another machine does not end it.
    """
    folder, number = job_folder(root, attempt), int(attempt.rpartition("-")[2])
    _expire(root, folder)
    _close_older(root, attempt, tag, other_machine_s=other_machine_s)
    for name in KEPT_BY_JOB:
        _make_folder(folder / name)
        link = attempt_folder(root, attempt) / name
        if link.is_dir() and not link.is_symlink():  # 0.1.0 made the attempt and did not start it
            shutil.rmtree(link)  # what it put there is in the store, and was brought
        if not os.path.lexists(link):
            link.symlink_to(Path("../..") / "jobs" / folder.name / name)
    write_json(folder / WRITER, {"n": number, "root": os.path.realpath(root)})
    return folder


def begin_bringing(root: Path, attempt: str, tag: str, files: Mapping[str, StoredFile]) -> list[str]:
    """Prepare the job's folder for the previous attempt's files, and return those that have to be sent.

    Files here that differ, or are not in `files`, are older than the store's and are deleted. May be repeated.

    Args:
        root: the node root.
        attempt: the one that is about to start here.
        tag: its value of `raylaunch.contract.VAR_ATTEMPT`.
        files: those that the store has, by path.

    Raises:
        ConflictError: a newer attempt has the folder.
        ClusterError: a process of an older attempt cannot be ended.
    """
    _close_older(root, attempt, tag)
    folder = job_folder(root, attempt)
    _make_folder(folder)
    write_json(folder / WRITER, {"n": 0})
    here = dict(kept_files(folder))
    for path, stat in here.items():
        if path not in files or not _equal(stat, files[path]):
            (folder / path).unlink(missing_ok=True)
    _prune(folder)
    for path, wanted in files.items():
        if wanted.sha256.startswith(LINK) and not (path in here and _equal(here[path], wanted)):
            target = _place(folder, path)
            target.symlink_to(wanted.sha256[len(LINK) :])
    return [
        path
        for path, wanted in files.items()
        if not wanted.sha256.startswith(LINK) and not (path in here and _equal(here[path], wanted))
    ]


def bring(root: Path, attempt: str, path: str, offset: int, data: bytes, wanted: StoredFile | None) -> None:  # noqa: PLR0913, PLR0917
    """Store a piece of a file; `wanted` describes the complete file and comes with the last piece.

    Raises:
        TransferError: the file has another checksum, or pieces are missing.
    """
    target = _place(job_folder(root, attempt), path)
    part = target.with_name(f".{target.name[:180]}{_PART}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_TRUNC if offset == 0 else 0)
    with os.fdopen(os.open(part, flags, 0o600), "r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(data)
    if wanted is None:
        return
    if part.stat().st_size != wanted.size or (wanted.sha256 and sha256_of(part) != wanted.sha256):
        part.unlink()
        msg = f"{path} arrived damaged: it differs from the store's file"
        raise TransferError(msg)
    if wanted.mtime_ns:
        os.utime(part, ns=(wanted.mtime_ns, wanted.mtime_ns))
    part.replace(target)


def end_bringing(root: Path, attempt: str, before: int, collected: Sequence[str] = ()) -> None:
    """Record that the files of the job's attempt number `before` are here.

    Args:
        root: the node root.
        attempt: the one that is about to start here.
        before: the number of the one before.
        collected: those of its outputs that were found in the working directory, which this attempt may replace.
    """
    folder = job_folder(root, attempt)
    write_file(folder / COLLECTED, json.dumps(list(collected)).encode())
    write_json(folder / WRITER, {"n": before})


def read_left(root: Path, attempt: str, path: str, offset: int, limit: int) -> LeftPiece:
    """Return a piece of an output of an ended attempt that stayed on the node.

    Raises:
        NotFoundError: it is not on this node, or no longer.
    """
    left = job_folder(root, attempt) / LEFT
    target = left / path
    try:
        if ".." in path.split("/") or Path(os.path.realpath(target)) != target:
            raise FileNotFoundError
        with os.fdopen(os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            file.seek(offset)
            return LeftPiece(file.read(limit), found.st_size, found.st_mtime_ns)
    except OSError:
        msg = f"{path} is no longer on the node: outputs that were not kept stay for {LEFT_S // 86400} days"
        raise NotFoundError(msg) from None


def drop(root: Path, attempt: str) -> None:
    """Delete the job's folder after its last attempt, unless a newer one has it. Outputs that were left stay a week."""
    _expire(root, job_folder(root, attempt))
    if last_writer(root, attempt) > int(attempt.rpartition("-")[2]):
        return
    folder = job_folder(root, attempt)
    if not (folder / LEFT).is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in KEPT_BY_JOB:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / COLLECTED).unlink(missing_ok=True)
    write_json(folder / WRITER, {"n": 0})


def _close_older(root: Path, attempt: str, tag: str, *, other_machine_s: float = _OTHER_MACHINE_S) -> None:
    """Ensure that no older attempt of the job still writes on this node.

    Raises:
        ConflictError: there is a newer one.
    """
    job, _, number = attempt.rpartition("-")
    roots = {
        base: _numbers(base, job) for base in dict.fromkeys((root, _writers_root(job_folder(root, attempt), root)))
    }
    newest = max([last_writer(root, attempt), *(number for numbers in roots.values() for number in numbers)])
    if newest > int(number):
        msg = f"attempt {newest} of {job} has replaced {attempt} on this node"
        raise ConflictError(msg)
    for base, numbers in roots.items():
        for name in (f"{job}-{other}" for other in sorted(numbers - {int(number)})):
            claim = close(base, name)
            end_processes(tag.removesuffix(attempt) + name, claim)
            if claim["epoch"] != FENCED and not is_this_boot(claim["boot_id"]):
                _wait_for_other_machine(base, name, other_machine_s)
            for kept in KEPT_BY_JOB:
                link = attempt_folder(base, name) / kept
                if link.is_symlink():
                    link.unlink()


def _numbers(root: Path, job: str) -> set[int]:
    """Return the numbers of a job's attempts below a node root."""
    return {int(name.rpartition("-")[2]) for name in attempts_in(root) if name.rpartition("-")[0] == job}


def _writers_root(folder: Path, own: Path) -> Path:
    """Return the node root of a job's last writer: `own`, or that of another node which has the same disk."""
    root = (read_json(folder / WRITER) or {}).get("root")
    other = Path(root) if isinstance(root, str) and root else own
    return own if os.path.realpath(own) == str(other) or not (other / "attempts").is_dir() else other


def _wait_for_other_machine(root: Path, attempt: str, limit_s: float) -> None:
    """Wait until an attempt's runner, which is on another machine or was on this one before a reboot, has ended it.

    Raises:
        ClusterError: it is still running.
    """
    folder, deadline = attempt_folder(root, attempt), time.monotonic() + limit_s
    if read_json(folder / EXIT) is None:  # so that it stops also if it can be reached only later
        request_stop(root, attempt, StopWish(why="stopped", grace_s=0.0))
    while read_json(folder / EXIT) is None and _is_beating(folder):
        if time.monotonic() > deadline:
            msg = f"{attempt} is still running on another machine that shares the folder {root}"
            raise ClusterError(msg, hint="stop it there, or give each host a root of its own")
        time.sleep(_POLL_S)


def _is_beating(folder: Path) -> bool:
    """Return whether a runner's heartbeat is recent, by the clock of the disk that it writes to."""
    at = beat_at(folder)
    if at is None:
        return False
    clock = folder / f".clock.{os.getpid()}"
    clock.write_bytes(b"")
    now = clock.stat().st_mtime
    clock.unlink(missing_ok=True)
    return now - at < _SILENT_S


def _equal(stat: FileStat, wanted: StoredFile) -> bool:
    if stat.link or wanted.sha256.startswith(LINK):
        return wanted.sha256 == LINK + stat.link
    return (stat.size, stat.mtime_ns) == (wanted.size, wanted.mtime_ns)


def _place(folder: Path, path: str) -> Path:
    """Return where a file belongs, and create the folders above it."""
    parts = path.split("/")
    if parts[0] not in KEPT_BY_JOB or ".." in parts or "" in parts:
        msg = f"{path!r} is not a path in a job's folder"
        raise ValueError(msg)
    target = folder.joinpath(*parts)
    if not Path(os.path.realpath(target.parent)).is_relative_to(folder):
        msg = f"{path!r} is outside the job's folder"
        raise ValueError(msg)
    _make_folder(target.parent)
    return target


def _make_folder(path: Path) -> None:
    """Create a folder and those above it, readable by this account only."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def _prune(folder: Path) -> None:
    """Delete everything but kept files and their folders: sockets, links that lead out."""
    kept = {str(folder / path) for path, _ in kept_files(folder)}
    for name in KEPT_BY_JOB:
        for parent, folders, files in os.walk(folder / name, topdown=False):
            for entry in [*files, *(each for each in folders if os.path.islink(f"{parent}/{each}"))]:  # noqa: PTH114
                if f"{parent}/{entry}" not in kept:
                    Path(parent, entry).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it has files
                Path(parent).rmdir()


def _expire(root: Path, own: Path) -> None:
    """Delete the folders of jobs that continued elsewhere and were not used here for a week."""
    alive = {name.rpartition("-")[0] for name in attempts_in(root)}
    for folder in _folders(own.parent):
        writer = folder / WRITER
        used_at = (writer if writer.exists() else folder).stat().st_mtime
        unused = folder.name not in alive and not _numbers(_writers_root(folder, root), folder.name)
        if folder != own and unused and time.time() - used_at > LEFT_S:
            shutil.rmtree(folder, ignore_errors=True)


def _folders(parent: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from [path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()]


def _copy_code(package: Path | None, code: Path) -> None:
    if code.is_dir():
        return
    temporary = code.with_name(f".{code.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    if package is None:
        temporary.mkdir(mode=0o700)
    else:
        shutil.copytree(package, temporary, symlinks=True, copy_function=_copy_file)
    temporary.chmod(0o700)
    temporary.rename(code)


def _copy_file(source: str, target: str) -> str:
    """Copy one file, sharing its blocks where the file system can; 0600, or 0700 for a program."""
    mode = 0o700 if os.access(source, os.X_OK) and os.lstat(source).st_mode & 0o100 else 0o600
    with (
        Path(source).open("rb") as reader,
        os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as writer,
    ):
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            shutil.copyfileobj(reader, writer, 1 << 20)
    os.utime(target, ns=(os.stat(source).st_atime_ns, os.stat(source).st_mtime_ns))  # noqa: PTH116 -- a string, as copytree gives it
    return target
