"""Packages on a node, received in pieces and verified: working directories, unpacked once for each content; wheels."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import re
import shutil
import tarfile
import threading
import zlib
from pathlib import Path

from raylaunch.errors import NotFoundError, StorageError, TransferError
from raylaunch.node.wheels import WHOLE
from raylaunch.runner.unpack import unpack

COMPLETE = -1
"""Answer of `Packages.have` for a package that is whole."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20
_ZIP = b"PK\x03\x04"


class Packages:
    """The packages below one node root. Every method may be repeated; threads may share it."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "packages"
        self._lock = threading.Lock()

    def path(self, sha256: str) -> Path:
        """Return the unpacked folder of a package.

        Raises:
            NotFoundError: The package is not whole here.
        """
        found = self._folder / _checked(sha256)
        if not found.is_dir():
            msg = f"the package {sha256[:12]} is not on this node"
            raise NotFoundError(msg)
        return found

    def have(self, sha256: str) -> int:
        """Return `COMPLETE`, or how many bytes of the package are here."""
        if (self._folder / _checked(sha256)).is_dir():
            return COMPLETE
        try:
            return self._part(sha256).stat().st_size
        except FileNotFoundError:
            return 0

    def put(self, sha256: str, offset: int, total: int, data: bytes) -> int:
        """Take a piece of a package, and unpack the package when it was the last.

        A piece that does not continue what is here changes nothing: go on from the answer.

        Args:
            sha256: Of the whole archive.
            offset: Of the piece in the archive, bytes.
            total: Size of the archive, bytes.
            data: The piece.

        Returns:
            As `have`.

        Raises:
            TransferError: The archive does not have this checksum, or cannot be unpacked. Its part is deleted.
            StorageError: The disk is full.
        """
        with self._lock:
            try:
                return self._put(sha256, offset, total, data)
            except OSError as error:
                what = f"the package {sha256[:12]} cannot be stored"
                raise storage_error(what, error) from error

    def _put(self, sha256: str, offset: int, total: int, data: bytes) -> int:
        have = self.have(sha256)
        if have == COMPLETE or offset != have:
            return have
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self._part(sha256)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab") as file:
            try:
                file.write(data)
                file.flush()
            except OSError:
                os.ftruncate(file.fileno(), offset)
                raise
        if offset + len(data) < total:
            return offset + len(data)
        self._unpack(sha256, part)
        return COMPLETE

    def _unpack(self, sha256: str, part: Path) -> None:
        if file_sha256(part) != sha256:
            part.unlink()
            msg = f"the package {sha256[:12]} arrived damaged: its checksum differs"
            raise TransferError(msg, hint="submit again")
        beside = self._folder / f"{sha256}.unpacking"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(mode=0o700)
        if _is_zip(part):  # a wheel, which is installed as it is
            part.rename(beside / WHOLE)
            beside.rename(self._folder / sha256)
            return
        try:
            unpack(part, beside)
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            part.unlink()
            msg = f"the package {sha256[:12]} cannot be unpacked: {error}"
            raise TransferError(msg) from error
        except OSError:  # a full disk: what was unpacked would only keep it full
            shutil.rmtree(beside, ignore_errors=True)
            raise
        beside.rename(self._folder / sha256)
        part.unlink()

    def _part(self, sha256: str) -> Path:
        return self._folder / f"{_checked(sha256)}.part"


def _is_zip(part: Path) -> bool:
    with part.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def _checked(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        msg = f"{sha256!r} does not name a package"
        raise NotFoundError(msg)
    return sha256


def file_sha256(path: Path) -> str:
    """Return the checksum of a file's bytes, in hex; a link is not followed."""
    digest = hashlib.sha256()
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def storage_error(what: str, error: OSError) -> StorageError:
    """Return the error that says in words why bytes could not be written here."""
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    why = f"the disk of {os.uname().nodename} is full" if full else (error.strerror or str(error))
    where = f" ({error.filename})" if error.filename else ""
    return StorageError(f"{what}: {why}{where}", hint="free some space there; see: raylaunch du" if full else "")
