"""Uploaded packages (packed working directories and wheels), named by their sha256; uploads can be resumed."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

from pydantic import ValidationError

from raylaunch.controller.settings import Settings
from raylaunch.controller.store.journal import write_all, write_problem
from raylaunch.controller.store.secrets import write_private
from raylaunch.errors import ConflictError, NotFoundError, SpecError, TransferError
from raylaunch.files import sha256_of, sync
from raylaunch.models.cluster import EnvironmentWheels
from raylaunch.models.job import WheelSet

_log = logging.getLogger(__name__)
PIECE_BYTES = 8 * 1024 * 1024
"""Maximum size of one piece of an upload."""
_SHA = re.compile(r"[0-9a-f]{64}")


class ClusterWheels:
    """``cluster_wheels.json``: the wheels of the cluster's own environment, as gathered by the last `up`."""

    def __init__(self, settings: Settings) -> None:
        self._path = settings.store / "cluster_wheels.json"
        self._environment = settings.default_environment
        self.sets = self._read()

    def _read(self) -> tuple[WheelSet, ...]:
        """Return the wheels, if they are for the current environment."""
        try:
            found = EnvironmentWheels.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return ()
        except (OSError, ValidationError) as error:
            _log.warning("%s cannot be read; the next up gathers the wheels again: %s", self._path, error)
            return ()
        return found.sets if found.environment == self._environment else ()

    @property
    def packages(self) -> frozenset[str]:
        """Their sha256s."""
        return frozenset(wheel.sha256 for one in self.sets for wheel in one.wheels)

    async def keep(self, given: EnvironmentWheels) -> None:
        """Store wheels for jobs that use the cluster's environment; those for other platforms remain.

        Raises:
            ConflictError: they are for another environment.
            StorageError: they cannot be stored.
        """
        if given.environment != self._environment:
            msg = f"these wheels are for {given.environment}, but the cluster's environment is {self._environment}"
            raise ConflictError(msg, hint="run again: raylaunch up")
        new = {one.platform for one in given.sets}
        sets = (*(one for one in self.sets if one.platform not in new), *given.sets)
        text = EnvironmentWheels(environment=self._environment, sets=sets).model_dump_json(indent=1)
        await asyncio.to_thread(write_private, self._path, text)
        self.sets = sets


class PackageBytes(NamedTuple):
    """How much of a package has been uploaded."""

    bytes: int
    complete: bool


class WrongOffsetError(ConflictError):
    """A piece does not continue the upload; `have` is the offset of the next piece."""

    def __init__(self, message: str, *, have: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.have = have


class PackageStore:
    """The folder of packages. May be used from several threads; each package is written by one at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        self._busy: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def have(self, sha: str) -> PackageBytes:
        """Return how much of the package has been uploaded."""
        complete, part = self._paths(sha)
        try:
            return PackageBytes(complete.stat().st_size, complete=True)
        except FileNotFoundError:
            return PackageBytes(part.stat().st_size if part.exists() else 0, complete=False)

    def complete(self, sha: str) -> bool:
        """Whether the package is complete."""
        return self.have(sha).complete

    def path(self, sha: str) -> Path:
        """Return the archive's file.

        Raises:
            NotFoundError: it is not complete.
        """
        if not self.have(sha).complete:
            msg = f"package {sha[:12]} is not in the store"
            raise NotFoundError(msg, hint="submit again: the client sends what is missing")
        return self._paths(sha)[0]

    def put(self, sha: str, *, offset: int, total: int, data: bytes) -> PackageBytes:
        """Store one piece of a package; the last one completes it, after its sha256 was verified.

        Args:
            sha: sha256 of the whole archive, in hex.
            offset: offset of the piece, bytes.
            total: size of the whole archive, bytes.
            data: the piece; may be empty at the end, to verify a package whose bytes are all here.

        Raises:
            SpecError: the numbers are inconsistent.
            WrongOffsetError: the piece does not continue the upload.
            TransferError: the sha256 differs; the upload is deleted.
            StorageError: the disk is full; the upload so far is kept.
        """
        if offset < 0 or not (data or offset == total) or offset + len(data) > total or len(data) > PIECE_BYTES:
            msg = f"a piece of {len(data)} bytes at {offset} does not fit a package of {total} bytes"
            raise SpecError(msg, hint=f"send pieces of 1 to {PIECE_BYTES} bytes that lie within the package")
        with self._turn(self._checked(sha)):
            have = self.have(sha)
            if have.complete:
                return have
            if offset != have.bytes:
                msg = f"package {sha[:12]} continues at {have.bytes}, not at {offset}"
                raise WrongOffsetError(msg, have=have.bytes, hint=f"send from {have.bytes} on")
            complete, part = self._paths(sha)
            _append(part, offset, data)
            if offset + len(data) < total:
                return PackageBytes(offset + len(data), complete=False)
            _complete(part, complete, sha)
            return PackageBytes(total, complete=True)

    def remove(self, sha: str) -> None:
        """Delete the package, or its unfinished upload."""
        with self._turn(self._checked(sha)):
            for path in self._paths(sha):
                path.unlink(missing_ok=True)

    def names(self) -> tuple[str, ...]:
        """Return the complete packages."""
        return tuple(sorted(path.name.removesuffix(".tar.gz") for path in self._folder.glob("*.tar.gz")))

    def bytes(self) -> int:
        """Return the size of all packages and unfinished uploads."""
        return sum(entry.stat().st_size for entry in os.scandir(self._folder))

    def _paths(self, sha: str) -> tuple[Path, Path]:
        self._checked(sha)
        return self._folder / f"{sha}.tar.gz", self._folder / f"{sha}.part"

    @staticmethod
    def _checked(sha: str) -> str:
        if not _SHA.fullmatch(sha):
            msg = f"{sha[:100]!r} is not a sha256"
            raise SpecError(msg, hint="name a package by the sha256 of its bytes, 64 hex digits")
        return sha

    def _turn(self, sha: str) -> threading.Lock:
        """Return the lock of a package; it is dropped when nobody uses it."""
        with self._lock:
            return self._busy.setdefault(sha, threading.Lock())


def _append(part: Path, offset: int, data: bytes) -> None:
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                write_all(fd, data, offset)
            except OSError:
                os.ftruncate(fd, offset)
                raise
        finally:
            os.close(fd)
    except OSError as error:
        raise write_problem(part, error) from error


def _complete(part: Path, complete: Path, sha: str) -> None:
    try:
        found = sha256_of(part)
        if found != sha:
            part.unlink()
            msg = f"package {sha[:12]} arrived damaged: its bytes have the sha256 {found[:12]}"
            raise TransferError(msg, hint="it was deleted; submit again to send it again")
        sync(part)
        part.rename(complete)
    except OSError as error:
        raise write_problem(part, error) from error
