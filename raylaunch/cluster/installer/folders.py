"""The folders on the host, its disk, and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

from raylaunch.cluster.installer.protocol import File, Request, StorageProblem, TransferProblem

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
            msg = f"{path} does not exist"
            raise TransferProblem(msg, "run the same command again, which pushes what is missing")
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


_SHA256_DIGITS = 64
_OLD_S = 24 * 3600.0


def unpack(request: Request) -> dict[str, object]:
    """Put the wheels of the request's bundle into their places, unless that was done already.

    They are not forced to the disk, which takes longest: `make` compares all checksums before it uses any.

    Raises:
        Problem: it is damaged, or the disk is full.
    """
    places = Places(request)
    if request.bundle:
        _unpack(places, Path(request.bundle))
        _sweep(places)
    return {"wheels": str(places.wheels)}


def _unpack(places: Places, bundle: Path) -> None:
    folder = places.wheels / f".unpacking-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with contextlib.suppress(FileNotFoundError), tarfile.open(bundle) as archive:
            for member in archive:
                content = archive.extractfile(member)
                _write(folder, member.name, content.read() if content else b"")
        for path in folder.glob("*/*"):
            target = places.wheels / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        bundle.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, name: str, content: bytes) -> None:
    sha256, _, file = name.partition("/")
    if len(sha256) != _SHA256_DIGITS or not file or "/" in file or hashlib.sha256(content).hexdigest() != sha256:
        msg = f"{name} was damaged on its way"
        raise TransferProblem(msg, "run the same command again, which pushes it again")
    (folder / sha256).mkdir(parents=True)
    (folder / sha256 / file).write_bytes(content)


def _sweep(places: Places) -> None:
    """Remove bundles whose clients never came back."""
    for bundle in places.wheels.glob(".bundle-*"):
        with contextlib.suppress(OSError):
            if time.time() - bundle.stat().st_mtime > _OLD_S:
                bundle.unlink()
