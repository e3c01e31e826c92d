"""The folders on the host, its disk, and the unpacking of pushed wheels."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

from raylaunch.cluster.installer.protocol import File, InstallerProblem, Request

_PRIVATE = 0o700
_SYNC_S = 60.0
_SHA256_DIGITS = 64
_OLD_S = 24 * 3600.0


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
            InstallerProblem: it is not there.
        """
        path = self.wheels / file.sha256 / file.file
        if not path.is_file():
            msg = f"{path} does not exist"
            raise InstallerProblem(msg, "run the same command again, which pushes what is missing", code="transfer")
        return path

    def make(self) -> None:
        """Create the folders, private to this account."""
        for folder in (self.root, self.versions, self.wheels, self.cache):
            folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)


def sync(folder: Path) -> None:
    """Write a folder's file system to the disk: after a power cut, what has its final name must be complete."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        writing = subprocess.Popen(["sync", "-f", str(folder)], stderr=subprocess.DEVNULL)  # noqa: S603, S607 -- coreutils'
        writing.wait(_SYNC_S)  # a process that writes cannot be ended: it is left alone then


def storage_problem(error: OSError, path: Path) -> InstallerProblem:
    """Return the error for a failed system call on `path`, with the free bytes if the disk is full."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = shutil.disk_usage(existing(path)).free
        msg = f"no space left to write {path}: {free} bytes free"
        return InstallerProblem(
            msg, "free some space there, or set root: to a folder on another disk of that host", code="host_storage"
        )
    msg = f"cannot use {path}: {error.strerror or error}"
    return InstallerProblem(
        msg, "check who owns it and its modes, or set root: to another folder of that host", code="host_storage"
    )


def existing(path: Path) -> Path:
    """Return `path` or its nearest parent that exists."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))


def unpack(places: Places, bundle: Path) -> None:
    """Move the wheels of a bundle to their folders, unless that was done already. Remove bundles of dead clients.

    They are not synced, which takes longest: all checksums are compared before a wheel is used.

    Raises:
        InstallerProblem: the bundle is damaged.
    """
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
    for left in places.wheels.glob(".bundle-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _OLD_S:
                left.unlink()


def _write(folder: Path, name: str, content: bytes) -> None:
    sha256, _, file = name.partition("/")
    if len(sha256) != _SHA256_DIGITS or not file or "/" in file or hashlib.sha256(content).hexdigest() != sha256:
        msg = f"{name} was damaged on its way"
        raise InstallerProblem(msg, "run the same command again, which pushes it again", code="transfer")
    (folder / sha256).mkdir(parents=True)
    (folder / sha256 / file).write_bytes(content)
