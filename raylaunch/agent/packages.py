"""Packages on a node (working directories and wheels), received in pieces and verified; and which wheels fit here."""

from __future__ import annotations

import errno
import gzip
import os
import platform
import re
import shutil
import subprocess
import tarfile
import threading
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from raylaunch.contract import ADDED_WHEELS, BUILD_WHEELS, WheelSpec
from raylaunch.errors import NotFoundError, StorageError, TransferError
from raylaunch.files import sha256_of
from raylaunch.runner.unpack import unpack

WHOLE = "wheel"
"""Name of a wheel inside its package's folder: each job has its own name for it."""
COMPLETE = -1
"""Result of `Packages.have` for a complete package."""
_PYTHON_S = 10.0
_VERSION = re.compile(r"\d+\.\d+\.\d+[a-z0-9+]{0,8}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ZIP = b"PK\x03\x04"


class Packages:
    """The packages below one node root. Every method may be repeated; threads may share it."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "packages"
        self._lock = threading.Lock()

    def path(self, sha256: str) -> Path:
        """Return the unpacked folder of a package.

        Raises:
            NotFoundError: The package is not complete here.
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
        """Store a piece of a package, and unpack the package after the last one.

        A piece that does not continue what is here changes nothing: continue from the result.

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
        temporary = self._folder / f"{sha256}.unpacking"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        if _is_zip(part):  # a wheel, which is installed as it is
            part.rename(temporary / WHOLE)
            temporary.rename(self._folder / sha256)
            return
        try:
            unpack(part, temporary)
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            part.unlink()
            msg = f"the package {sha256[:12]} cannot be unpacked: {error}"
            raise TransferError(msg) from error
        except OSError:  # a full disk: do not keep it full
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        temporary.rename(self._folder / sha256)
        part.unlink()

    def _part(self, sha256: str) -> Path:
        return self._folder / f"{_checked(sha256)}.part"


class Platform(TypedDict):
    """`raylaunch.models.job.BuildPlatform`, as plain data."""

    arch: str
    glibc: str
    python: str


class WheelSetData(TypedDict):
    """`raylaunch.models.job.WheelSet`, as plain data."""

    platform: Platform
    wheels: list[WheelSpec]


def this_platform() -> Platform:
    """Return what decides which wheels fit here."""
    library, version = platform.libc_ver()
    return Platform(
        arch=platform.machine(), glibc=version if library == "glibc" else "", python=platform.python_version()
    )


def platform_of(environment: Mapping[str, str], env: Mapping[str, str]) -> Platform:
    """Return what decides which wheels fit an environment that is on this node: its own Python counts.

    Nothing is known about one in the working directory, which is not here yet, or one that does not run: then the
    result is for the Python of this process, as for environments that are built. Blocks for `_PYTHON_S` at most.

    Args:
        environment: its kind and value.
        env: variables of the job.
    """
    here = this_platform()
    python = _python_of(environment["kind"], environment["value"], env)
    if python is None:
        return here
    try:
        done = subprocess.run(  # noqa: S603 -- the interpreter that the job would run
            [python, "-I", "-c", "import platform; print(platform.python_version())"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_PYTHON_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return here
    version = done.stdout.strip()
    return Platform(arch=here["arch"], glibc=here["glibc"], python=version) if _VERSION.fullmatch(version) else here


def choose_wheels(sets: Iterable[WheelSetData], here: Platform) -> list[WheelSpec]:
    """Return the wheels for this platform; none if none were gathered for it, because it reached an index."""
    return next((one["wheels"] for one in sets if one["platform"] == here), [])


def link_wheels(packages: Path, wheels: Iterable[WheelSpec], folder: Path) -> None:
    """Create a folder with the wheels under their names, and others for build tools and for added packages.

    May be repeated; without wheels there is no folder.
    """
    listed = list(wheels)
    own = [one for one in listed if not one["build"] and not one["added"]]
    _link_folder(packages, own, folder)
    _link_folder(packages, [one for one in listed if one["build"]], folder.with_name(BUILD_WHEELS))
    _link_folder(packages, [one for one in listed if one["added"]], folder.with_name(ADDED_WHEELS))


def file_sha256(path: Path) -> str:
    """Return the checksum of a file's bytes, in hex; a link is not followed."""
    return sha256_of(os.open(path, os.O_RDONLY | os.O_NOFOLLOW))


def storage_error(what: str, error: OSError) -> StorageError:
    """Return an error with the reason why bytes could not be written here."""
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    why = f"the disk of {os.uname().nodename} is full" if full else (error.strerror or str(error))
    where = f" ({error.filename})" if error.filename else ""
    return StorageError(f"{what}: {why}{where}", hint="free some space there; see: raylaunch du" if full else "")


def _python_of(kind: str, value: str, env: Mapping[str, str]) -> str | None:
    """Return the interpreter of a named environment; None where it is not known, or there is none."""
    path = Path(value).expanduser() if value.startswith(("/", "~/")) else None
    if kind == "python":
        return shutil.which(value if path is None else str(path), path=env.get("PATH") or os.defpath)
    if kind == "conda" and path is None:
        conda = env.get("CONDA_EXE") or shutil.which("conda", path=env.get("PATH") or os.defpath)
        roots = [Path(conda).resolve().parent.parent] if conda else []
        places = [*(root / "envs" / value for root in roots), Path("~/.conda/envs").expanduser() / value]
        path = next((place for place in places if place.is_dir()), None)
    found = path / "bin" / "python" if path is not None and kind in {"venv", "conda"} else None
    return str(found) if found is not None and found.exists() else None


def _link_folder(packages: Path, wheels: Iterable[WheelSpec], folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    for wheel in wheels:
        temporary.mkdir(mode=0o700, exist_ok=True)
        (temporary / os.path.basename(wheel["file"])).symlink_to(packages / wheel["sha256"] / WHOLE)  # noqa: PTH119 -- a name from elsewhere
    if temporary.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def _is_zip(part: Path) -> bool:
    with part.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def _checked(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        msg = f"{sha256!r} does not name a package"
        raise NotFoundError(msg)
    return sha256
