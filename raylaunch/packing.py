"""The working directory as one archive: what is left out, what goes in, and its checksum as its name.

Ignore rules are those of git (``.gitignore`` files at every level, and those above up to the repository's root), with
``.raylaunchignore`` beside them, which has the last word. What is built in comes first, so that ``!wandb/`` in an
ignore file brings a folder back; only ``.git`` and ``.raylaunch`` never travel. Ignored folders are not looked into.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import hashlib
import heapq
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from typing_extensions import Self

from raylaunch.errors import ConflictError, SpecError, StorageError
from raylaunch.ignoring import IgnoreRules
from raylaunch.state import FileFact, PackReport

LARGEST = 5
_MEMBER_TIME = 315_619_200
"""1980-01-02: the same for every file, so that equal folders make equal archives; zip files know nothing earlier."""


class Packed:
    """An archive in a temporary file without a name, of which nothing is left even when this process is killed.

    A context manager: the file goes with it.
    """

    def __init__(self, file: IO[bytes], sha256: str, report: PackReport) -> None:
        self.file = file
        self.sha256 = sha256
        self.report = report
        self.bytes = os.fstat(file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def pack(working_dir: str | Path) -> Packed:
    """Pack a folder into a temporary tar.gz. Equal folders make equal archives; memory stays flat.

    Raises:
        SpecError: there is no such folder, or a symbolic link in it leads out of it.
        StorageError: a file in it cannot be read, or there is no room for the archive.
        ConflictError: a file was written to while it was read.
    """
    root = checked_working_dir(working_dir)
    with contextlib.ExitStack() as unless_done:
        try:
            file = unless_done.enter_context(tempfile.TemporaryFile())
            sink = _Hashing(file)
            report = _write(root, sink)
            file.seek(0)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                msg = f"there is no room to pack {root}: the disk of {tempfile.gettempdir()} is full"
                hint = "free some space there, or set TMPDIR to a folder on another disk"
                raise StorageError(msg, hint=hint) from None
            raise
        unless_done.pop_all()
        return Packed(file, sink.sha256.hexdigest(), report)


async def packed_apart(working_dir: Path) -> Packed:
    """Pack in a thread; when the caller is cancelled, the temporary file goes as soon as it is made.

    Raises:
        RaylaunchError: as `pack`.
    """
    packing = asyncio.ensure_future(asyncio.to_thread(pack, working_dir))
    try:
        return await asyncio.shield(packing)
    except asyncio.CancelledError:
        packing.add_done_callback(_discard)
        raise


def _discard(packing: asyncio.Future[Packed]) -> None:
    if not packing.cancelled() and packing.exception() is None:
        packing.result().__exit__(None, None, None)


def checked_working_dir(working_dir: str | Path) -> Path:
    """Return the folder, resolved.

    Raises:
        SpecError: it does not exist, or is not a folder.
    """
    root = Path(working_dir).expanduser()
    if not root.exists():
        msg = f"the working directory {root} does not exist"
        raise SpecError(msg, field="working_dir", hint="give another with --working-dir, or working_dir: in job.yaml")
    if not root.is_dir():
        msg = f"the working directory {root} is a file, not a folder"
        raise SpecError(msg, field="working_dir", hint="name the folder that holds it")
    return root.resolve()


class _Hashing:
    """A binary file that knows the checksum of what was written to it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._raw.write(data)

    def flush(self) -> None:
        self._raw.flush()


class _Tally:
    """Counts what goes in and what stays out."""

    def __init__(self) -> None:
        self.files = 0
        self.bytes = 0
        self.ignored = 0
        self.ignored_bytes = 0
        self.rules: dict[str, int] = {}
        self._largest: list[tuple[int, str]] = []

    def packed(self, path: str, size: int) -> None:
        self.files += 1
        self.bytes += size
        heapq.heappush(self._largest, (size, path))
        if len(self._largest) > LARGEST:
            heapq.heappop(self._largest)

    def left_out(self, rule: str, size: int) -> None:
        self.ignored += 1
        self.ignored_bytes += size
        self.rules[rule] = self.rules.get(rule, 0) + 1

    def report(self) -> PackReport:
        largest = sorted(self._largest, key=lambda item: (-item[0], item[1]))
        return PackReport(
            files=self.files,
            bytes=self.bytes,
            ignored=self.ignored,
            ignored_bytes=self.ignored_bytes,
            ignored_by=tuple(sorted(self.rules)),
            largest=tuple(FileFact(path=_printable(path), bytes=size) for size, path in largest),
        )


def _printable(path: str) -> str:
    """Return a file name as text: names that are not UTF-8 cannot travel in JSON."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _write(root: Path, sink: _Hashing) -> PackReport:
    tally = _Tally()
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=sink, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive,
    ):
        for found in _walk(root, tally):
            _add(archive, root, found, tally)
    return tally.report()


class _Found(NamedTuple):
    path: str
    entry: os.DirEntry[str]


def _walk(root: Path, tally: _Tally) -> Iterator[_Found]:
    """Yield what is to be packed, each folder before its contents, in the order of names."""
    stack = [("", IgnoreRules.above(root))]
    while stack:
        folder, outer = stack.pop()
        rules = outer.entering(root, folder)
        deeper = []
        for entry in _entries(root / folder, folder or "."):
            path = f"{folder}/{entry.name}" if folder else entry.name
            is_dir = entry.is_dir(follow_symlinks=False)
            rule = rules.rule_against(path, entry, is_dir=is_dir)
            if rule:
                tally.left_out(rule, 0 if is_dir else entry.stat(follow_symlinks=False).st_size)
                continue
            yield _Found(path, entry)
            if is_dir:
                deeper.append((path, rules))
        stack.extend(reversed(deeper))


def _entries(folder: Path, shown: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise _unreadable(shown, error) from None


def _unreadable(path: str, error: OSError) -> StorageError:
    return StorageError(
        f"{_printable(path)} in the working directory cannot be read: {error.strerror}",
        hint=f"make it readable, or leave it out with a line in .raylaunchignore: /{_printable(path)}",
    )


def _add(archive: tarfile.TarFile, root: Path, found: _Found, tally: _Tally) -> None:
    entry = found.entry
    facts = entry.stat(follow_symlinks=False)
    member = tarfile.TarInfo(found.path)
    member.mtime = _MEMBER_TIME
    member.mode = 0o755 if stat.S_ISDIR(facts.st_mode) or facts.st_mode & stat.S_IXUSR else 0o644
    if entry.is_symlink():
        member.type, member.linkname = tarfile.SYMTYPE, _checked_link(root, found.path)
        archive.addfile(member)
        tally.packed(found.path, 0)
    elif stat.S_ISDIR(facts.st_mode):
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    elif stat.S_ISREG(facts.st_mode):
        tally.packed(found.path, _add_file(archive, member, entry.path))
    else:
        tally.left_out("built in: sockets, pipes and devices", 0)


def _checked_link(root: Path, path: str) -> str:
    target = os.readlink(root / path)  # noqa: PTH115 -- the text as it stands, surrogates and all
    place = os.path.normpath(os.path.join(os.path.dirname(path), target))  # noqa: PTH118, PTH120 -- not to be resolved
    if os.path.isabs(target) or place == ".." or place.startswith("../"):  # noqa: PTH117
        msg = f"{_printable(path)} in the working directory is a link to {_printable(target)}, which is not in it"
        raise SpecError(
            msg,
            field="working_dir",
            hint=f"copy what it points to, or leave it out with a line in .raylaunchignore: /{_printable(path)}",
        )
    return target


def _add_file(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int:
    try:
        file = open(path, "rb")  # noqa: PTH123, SIM115 -- a name of any bytes; closed below
    except OSError as error:
        raise _unreadable(member.name, error) from None
    with file:
        before = os.fstat(file.fileno())
        member.size = before.st_size
        try:
            archive.addfile(member, file)
        except OSError as error:
            if error.args == ("unexpected end of data",):  # tarfile's words for a file that became shorter
                raise _changed(member.name) from None
            raise
        after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise _changed(member.name)
    return before.st_size


def _changed(path: str) -> ConflictError:
    return ConflictError(
        f"{_printable(path)} in the working directory was written to while it was packed",
        hint=f"wait until it is written, or leave it out with a line in .raylaunchignore: /{_printable(path)}",
    )
