"""The working directory of a job on a node: unpacking it, and which of its links are broken. Standard library only.

Files and folders come first, symbolic links last. A link may lead anywhere, as in a clone; nothing is ever written
through one, because there is none while files are written, and a link's folder must be a folder.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from raylaunch import contract

_BLOCK = 1 << 20
_LARGEST_READ = 16 << 20
"""A header is read as a whole; no header of ours comes near this."""
MAX_FILES = 500_000
_PROGRAM = 0o100


class _Bounded:
    """What an archive unpacks to, as a file that ends with an error where it is longer than it may be."""

    def __init__(self, file: gzip.GzipFile, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _LARGEST_READ:
            msg = "a header of the package is too large"
            raise tarfile.ReadError(msg)
        data = self._file.read(size)
        self._check(self._file.tell())
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check(offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, at: int) -> None:
        if at > self._max_bytes:
            msg = f"it unpacks to more than {self._max_bytes} bytes"
            raise tarfile.ReadError(msg)


def unpack(package: Path, folder: Path, *, max_bytes: int | None = None, max_files: int = MAX_FILES) -> None:
    """Unpack a package into an empty folder, and write nowhere else.

    Args:
        package: what `raylaunch.client.packing` made, a tar.gz of files, folders and symbolic links.
        folder: where to.
        max_bytes: bytes that it may unpack to; by default what `contract.most_unpacked` allows.
        max_files: files, folders and links that it may have.

    Raises:
        tarfile.TarError: it is too large; or a member is outside the folder, is there twice, or is something else.
        OSError: the disk is full.
    """
    limit = contract.most_unpacked(package.stat().st_size) if max_bytes is None else max_bytes
    with gzip.open(str(package)) as unzipped, tarfile.open(fileobj=_Bounded(unzipped, limit), mode="r:") as archive:  # type: ignore[call-overload]  # tarfile reads and seeks, no more
        _unpack(archive, folder, max_files)


def _unpack(archive: tarfile.TarFile, folder: Path, max_files: int) -> None:
    links = []
    for n, member in enumerate(archive):
        if n >= max_files:
            msg = f"it has more than {max_files} files"
            raise tarfile.ReadError(msg)
        if member.issparse():  # a few bytes that expand to any number of zeros
            msg = f"{member.name} is neither file, folder nor symbolic link"
            raise tarfile.ReadError(msg)
        target = folder.joinpath(*_parts(member.name))
        with _named_once(member):
            (target if member.isdir() else target.parent).mkdir(mode=0o755, parents=True, exist_ok=True)
            if member.isfile():
                _write(archive, member, target)
        if member.issym():
            links.append((target, member))
        elif not (member.isfile() or member.isdir()):
            msg = f"{member.name} is neither file, folder nor symbolic link"
            raise tarfile.ReadError(msg)
    for target, member in links:
        with _named_once(member):
            target.symlink_to(member.linkname)


def broken_links(code: Path, links: Sequence[str]) -> list[str]:
    """Return a sentence for each of these links in `code` that leads nowhere on this node."""
    broken = [code / link for link in links if (code / link).is_symlink() and not (code / link).exists()]
    node = os.uname().nodename
    return [f"the link {link.relative_to(code)} -> {os.readlink(str(link))} is broken on {node}" for link in broken]  # noqa: PTH115 -- Python 3.8


@contextlib.contextmanager
def _named_once(member: tarfile.TarInfo) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        msg = f"{member.name} is in the package twice"
        raise tarfile.ReadError(msg) from None


def _parts(name: str) -> tuple[str, ...]:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        msg = f"{name} is outside the package"
        raise tarfile.ReadError(msg)
    return path.parts


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    content = archive.extractfile(member)
    mode = 0o755 if member.mode & _PROGRAM else 0o644
    with os.fdopen(os.open(str(target), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as file:
        if content is not None:
            shutil.copyfileobj(content, file, _BLOCK)
    os.utime(str(target), (member.mtime, member.mtime))
