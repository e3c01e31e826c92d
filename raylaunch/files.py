"""Atomic writes, checksums, log rotation, locks, and directories that are held open by their descriptor.

Standard library and the syntax of Python 3.8 only: the runner uses it too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

MOST_BYTES = 16 * 1024 * 1024
"""Size from which a log is rotated."""

_BLOCK = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_THROUGH: int = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""For a folder on the way to another; if the system supports it, the folder need not be readable."""


def write_atomic(
    path: Path, data: bytes | str, *, mode: int = 0o600, durable: bool = True, only_writer: bool = False
) -> None:
    """Write a whole file to a temporary name and rename it, so that a reader sees the old content or the new.

    Args:
        path: the file, which is replaced if it exists; a link is replaced, not followed.
        data: its content; text is UTF-8.
        mode: permissions, less the umask.
        durable: whether to sync the content to the disk before the rename.
        only_writer: whether nobody else writes this file. The temporary name is then fixed, and the next call removes
            what a crash left there.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    unique = "" if only_writer else f"{os.getpid()}.{os.urandom(4).hex()}."
    temporary = path.with_name(f".{path.name}.{unique}new")
    try:
        if only_writer:
            temporary.unlink(missing_ok=True)
        descriptor = os.open(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def create_exclusive(path: Path, data: bytes) -> bool:
    """Make a file with its whole content, or return False when it is there. Nobody sees it half written.

    Other machines may have the folder too, and processes with the same id.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(8).hex()}")
    write_atomic(temporary, data)
    try:
        os.link(str(temporary), str(path))  # as O_EXCL: fails when the name exists
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; copy it to another file system, or one without hard links.

    Raises:
        FileExistsError: the name is taken.
        OSError: it cannot be written.
    """
    try:
        os.link(str(source), str(target))
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(str(source), str(target))


def replace_link(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target`; one that exists is replaced in one step."""
    temporary = link.with_name(f".{link.name}.{os.urandom(4).hex()}")
    temporary.symlink_to(target)
    temporary.replace(link)


def sync(path: Path) -> None:
    """Sync a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(str(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(source: Path | int) -> str:
    """Return the SHA-256 of a file in hex; memory stays flat.

    Args:
        source: its path, or an open descriptor, which is closed.
    """
    digest = hashlib.sha256()
    with open(source, "rb") as file:  # noqa: PTH123 -- a descriptor too
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def rotate(path: Path, *, most_bytes: int = MOST_BYTES) -> bool:
    """Copy a large log to ``<name>.1`` and empty it; return whether that was done.

    Its writers keep their descriptors, which must append (O_APPEND). A line that is written meanwhile may be lost.
    """
    try:
        if path.stat().st_size <= most_bytes:
            return False
        kept = path.with_name(f"{path.name}.1")
        with contextlib.suppress(OSError):  # on a full disk, space is worth more than the lines
            shutil.copyfile(path, kept)
            kept.chmod(0o600)
        os.truncate(path, 0)
    except OSError:  # there is no log, or it is read-only
        return False
    return True


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Try to lock a file while the block lasts; yield whether that succeeded. The kernel frees it if we are killed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


class Directory:
    """An open directory. A context manager; errors are `OSError`, with the full path as file name.

    Args:
        descriptor: of the directory; closed with this object.
        path: its path, for messages and results.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path

    @classmethod
    def open(cls, path: Path, *, make: bool = False) -> Self:
        """Open a directory by a path that a person gave.

        The parents of an absolute path may be links; no part of a relative path may be, because the current folder
        may come from somebody else. `make` creates what is missing.

        Raises:
            OSError: ELOOP for a link; ENOTDIR for anything else that is not a directory.
        """
        plain = not path.is_absolute() and ".." not in path.parts
        whole = Path.cwd() / path
        start, names = (Path(), path.parts) if plain else (whole.parent, (whole.name,))
        if whole.name in {"", ".."}:
            start, names = whole, ()
        real = start.resolve()
        if make:
            real.mkdir(parents=True, exist_ok=True)
        with cls(os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), start) as above:
            return above.below(names, make=make)

    @classmethod
    def open_resolved(cls, path: Path) -> Self:
        """Open a directory by a path without links, as `Path.resolve` returns it: name by name, from the root.

        Raises:
            OSError: ELOOP if a part of it has become a link.
        """
        with cls(os.open(path.anchor, _THROUGH), Path(path.anchor)) as top:
            return top.below(path.parts[1:])

    def below(self, names: Sequence[str], *, make: bool = False) -> Self:
        """Open a directory below this one, name by name; no name may be a link. `make` creates what is missing."""
        current = type(self)(os.dup(self.descriptor), self.path)
        for at, name in enumerate(names, 1):
            with current:
                current = current.child(name, make=make, through=at < len(names))
        return current

    def child(self, name: str, *, make: bool = False, through: bool = False) -> Self:
        """Open a directory in this one, not a link. `make` creates it; `through` allows only to open its content."""
        path = self.path / name
        try:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o777, dir_fd=self.descriptor)
            return type(self)(os.open(name, _THROUGH if through else _FOLDER, dir_fd=self.descriptor), path)
        except NotADirectoryError:
            raise self._not_a_folder(name) from None
        except OSError as error:
            raise _with_path(error, path) from None

    def _not_a_folder(self, name: str) -> OSError:
        found = self.stat(name)
        link = found is not None and stat.S_ISLNK(found.st_mode)
        code = errno.ELOOP if link else errno.ENOTDIR
        return OSError(code, "it is a link" if link else "it is not a folder", str(self.path / name))

    def open_file(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Open a regular file in this directory and return its descriptor.

        Raises:
            OSError: ELOOP for a link; EINVAL for a pipe, a device or a folder.
        """
        path = self.path / name
        try:
            descriptor = os.open(
                name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode, dir_fd=self.descriptor
            )
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "it is a link", str(path)) from None
            raise _with_path(error, path) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a file", str(path))
        os.set_blocking(descriptor, True)
        return descriptor

    def stat(self, name: str) -> os.stat_result | None:
        """Return the stat result of a name, without following a link; None if it does not exist."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def has(self, name: str) -> bool:
        """Return whether a name exists here and can be read."""
        try:
            return self.stat(name) is not None
        except OSError:
            return False

    def replace(self, name: str, target: str) -> None:
        """Rename a file within this directory; an existing file or link is replaced, not followed."""
        try:
            os.rename(name, target, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except OSError as error:
            raise _with_path(error, self.path / target) from None

    def unlink(self, name: str) -> None:
        """Remove a file or link if it exists."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _with_path(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, error.strerror, str(path))
