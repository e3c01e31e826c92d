"""The working directory of a job on a node: unpacking it, and which of its links are broken. Standard library only.

Files and folders come first, symbolic links last. A link may lead anywhere, as in a clone; nothing is ever written
through one, because there is none while files are written, and a link's folder must be a folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

_BLOCK = 1 << 20
_PROGRAM = 0o100


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Unpack an archive into an empty folder, and write nowhere else.

    Args:
        archive: what `raylaunch.packing` made: files, folders and symbolic links.
        folder: where to.

    Raises:
        tarfile.TarError: a member lies outside, is there twice, or is something else.
        OSError: the disk is full.
    """
    links = []
    for member in archive:
        place = folder.joinpath(*_parts(member.name))
        with _named_once(member):
            (place if member.isdir() else place.parent).mkdir(mode=0o755, parents=True, exist_ok=True)
            if member.isfile():
                _write(archive, member, place)
        if member.issym():
            links.append((place, member))
        elif not (member.isfile() or member.isdir()):
            msg = f"{member.name} is neither file, folder nor symbolic link"
            raise tarfile.ReadError(msg)
    for place, member in links:
        with _named_once(member):
            place.symlink_to(member.linkname)


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
        msg = f"{name} leads out of the package"
        raise tarfile.ReadError(msg)
    return path.parts


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
    content = archive.extractfile(member)
    mode = 0o755 if member.mode & _PROGRAM else 0o644
    with os.fdopen(os.open(str(place), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as file:
        if content is not None:
            shutil.copyfileobj(content, file, _BLOCK)
    os.utime(str(place), (member.mtime, member.mtime))
