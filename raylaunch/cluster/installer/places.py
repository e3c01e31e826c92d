"""The folders on the host, its disk, and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from raylaunch.cluster.installer.words import File, Request, StorageProblem, TransferProblem

_PRIVATE = 0o700
_SYNC_S = 60.0


class Places:
    """The folders on the host."""

    def __init__(self, request: Request) -> None:
        self.root = Path(request.root).expanduser().absolute()
        self.versions = self.root / "versions"
        self.env = self.versions / request.name
        self.python = self.env / "bin" / "python"
        self.making = self.versions / f".{request.name}.making-{os.getpid()}"
        self.lock = self.versions / f".{request.name}.lock"
        self.wheels = self.root / "wheels"
        """Below, each in a folder named by its checksum."""
        self.cache = self.root / "cache" / "uv"

    def wheel(self, file: File) -> Path:
        """Return the path of a wheel.

        Raises:
            Problem: it is not there.
        """
        path = self.wheels / file.sha256 / file.file
        if not path.is_file():
            msg = f"{path} is not there"
            raise TransferProblem(msg, "run the same command again: what is missing is pushed")
        return path

    def make(self) -> None:
        """Make the folders, which nobody else may enter."""
        for folder in (self.root, self.versions, self.wheels, self.cache):
            folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)


def is_taken(descriptor: int) -> bool:
    """Take the lock of an open file, unless another process has it; the kernel frees the lock of one that dies."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync(folder: Path) -> None:
    """Have all of it written to the disk, so that a power cut leaves complete things only under their names."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        writing = subprocess.Popen(["sync", "-f", str(folder)], stderr=subprocess.DEVNULL)  # noqa: S603, S607 -- coreutils'
        writing.wait(_SYNC_S)  # a process that writes cannot be ended: it is left alone then


def storage_problem(error: OSError, path: Path) -> StorageProblem:
    """Say what the operating system had against `path`, with the free bytes if the disk is full."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = shutil.disk_usage(existing(path)).free
        msg = f"no space left to write {path}: {free} bytes free"
        return StorageProblem(msg, "free some space there, or set root: to a folder on another disk of that host")
    msg = f"cannot use {path}: {error.strerror or error}"
    return StorageProblem(msg, "check who owns it and its modes, or set root: to another folder of that host")


def existing(path: Path) -> Path:
    """Return the nearest folder on the way to `path` that is there."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
