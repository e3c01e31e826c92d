"""Packs the working directory as one archive, named by its checksum, and uploads it.

`raylaunch.client.ignore_rules` selects the files. Symbolic links stay links. The checks of
`raylaunch.client.sensitive` apply here, for every interface.
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
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from typing_extensions import Self, TypedDict

from raylaunch.client.git_facts import tracked_files
from raylaunch.client.ignore_rules import FoundPath, LeftOut, TrackedFiles, printable, unreadable, walk
from raylaunch.client.sensitive import NO_MORE, Allowances, is_allowed, refuse_home, refuse_secrets, too_large
from raylaunch.client.transport import OnProgress, Response, Retry, Transport, allow_upload, no_progress
from raylaunch.contract import most_unpacked
from raylaunch.errors import ConflictError, SpecError, StorageError, TransferError
from raylaunch.files import Directory
from raylaunch.models.fields import Count
from raylaunch.models.job import FileFact, LinkFact, PackReport
from raylaunch.runner.outputs import HEAD, holds_private_key, looks_secret

CHUNK = 8 * 1024 * 1024
_CONFLICT = 409
LARGEST = 5
_MOST_LINKS = 100
_MEMBER_TIME = 315_619_200
"""1980-01-02 for every file, so that equal folders make equal archives; zip files have no earlier time."""


class _Have(TypedDict):
    have: Count
    complete: bool


class Contents(NamedTuple):
    """The files in a package, and those left out. Paths are relative to the working directory."""

    paths: frozenset[str]
    left_out: Mapping[str, str]
    """Paths of files and whole folders, with the rules as written."""


NOTHING = Contents(frozenset(), {})


class Packed:
    """An archive in an unnamed temporary file, which the system deletes even if this process is killed.

    A context manager, which closes the file.
    """

    def __init__(self, file: IO[bytes], sha256: str, report: PackReport, contents: Contents = NOTHING) -> None:
        self.file = file
        self.sha256 = sha256
        self.report = report
        self.contents = contents
        self.bytes = os.fstat(file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def pack(working_dir: str | Path, allow: Allowances = NO_MORE) -> Packed:
    """Pack a folder into a temporary tar.gz. Equal folders make equal archives.

    Args:
        working_dir: the folder.
        allow: files and sizes that are refused otherwise.

    Raises:
        SpecError: there is no such folder, or it is a home folder.
        WithheldError: files in it look like secrets, or its package is larger than allowed.
        StorageError: a file cannot be read, or there is no space for the archive.
        ConflictError: a file was changed while it was read.
    """
    root = checked_working_dir(working_dir)
    if not allow.links and root != Path(working_dir):
        raise _is_link(Path(working_dir))
    with contextlib.ExitStack() as unless_done:
        try:
            file = unless_done.enter_context(tempfile.TemporaryFile())
            sink, tally = _Sink(file, allow.upload), _Tally()
            with _opened(root) as folder:
                _write(folder, sink, tally)
            file.seek(0)
        except _FullError:
            raise too_large(allow.upload, tally.largest()) from None
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                msg = f"there is no space to pack {root}: the disk of {tempfile.gettempdir()} is full"
                hint = "free some space there, or set TMPDIR to a folder on another disk"
                raise StorageError(msg, hint=hint) from None
            raise
        refuse_secrets([printable(path) for path in tally.secrets if not is_allowed(path, allow.names)])
        _refuse_bomb(os.fstat(file.fileno()).st_size, tally)
        unless_done.pop_all()
        contents = Contents(frozenset(tally.paths), tally.left)
        return Packed(file, sink.sha256.hexdigest(), tally.report(), contents)


def _opened(root: Path) -> Directory:
    try:
        return Directory.open_resolved(root)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _is_link(root) from None
        raise unreadable(str(root), error) from None


def _is_link(root: Path) -> SpecError:
    msg = f"the working directory {root} has become a link, or is behind one, and was not packed"
    return SpecError(msg, field="working_dir", hint="name the folder itself")


def _refuse_bomb(packed: int, tally: _Tally) -> None:
    """Refuse a package that no node would unpack."""
    if tally.unpacked > most_unpacked(packed):
        largest = ", ".join(f"{one.path} ({one.bytes} B)" for one in tally.largest()[:3])
        msg = (
            f"the files are {tally.unpacked} B, and their package {packed} B: a node refuses to unpack more than a "
            "hundred times a package's size"
        )
        hint = f"leave out files that are nearly empty, with .raylaunchignore; the largest: {largest}"
        raise SpecError(msg, field="working_dir", hint=hint)


async def pack_in_thread(working_dir: Path, allow: Allowances = NO_MORE) -> Packed:
    """Pack in a thread; if the caller is cancelled, the archive is deleted. Raises as `pack`."""
    packing = asyncio.ensure_future(asyncio.to_thread(pack, working_dir, allow))
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
        SpecError: it does not exist, is not a folder, or is a home folder.
    """
    root = Path(working_dir).expanduser()
    if not root.exists():
        msg = f"the working directory {root} does not exist"
        raise SpecError(msg, field="working_dir", hint="give another with --working-dir, or working_dir: in job.yaml")
    if not root.is_dir():
        msg = f"the working directory {root} is a file, not a folder"
        raise SpecError(msg, field="working_dir", hint="name its folder")
    found = root.resolve()
    refuse_home(found)
    return found


class _FullError(Exception):
    """More bytes were written than are allowed."""


class _Sink:
    """A binary file with a size limit, which computes the checksum of its content."""

    def __init__(self, raw: IO[bytes], limit: int) -> None:
        self._raw = raw
        self._left = limit
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise _FullError
        self.sha256.update(data)
        return self._raw.write(data)

    def flush(self) -> None:
        self._raw.flush()


class _Tally:
    """Counts what is packed and what is left out."""

    def __init__(self) -> None:
        self.bytes = 0
        self.unpacked = 0
        """Bytes of the archive before compression, headers included."""
        self.ignored_bytes = 0
        self.files = 0
        self.paths: set[str] = set()
        self.left: dict[str, str] = {}
        self.secrets: list[str] = []
        self._links: list[LinkFact] = []
        self._links_out = 0
        self._largest: list[tuple[int, str]] = []

    def packed(self, path: str, size: int) -> None:
        self.paths.add(path)
        self.files += 1
        self.bytes += size
        heapq.heappush(self._largest, (size, path))
        if len(self._largest) > LARGEST:
            heapq.heappop(self._largest)

    def left_out(self, path: str, left: LeftOut, size: int) -> None:
        self.left[path] = left.rule
        self.ignored_bytes += size

    def leads_out(self, path: str, target: str) -> None:
        self._links_out += 1
        if len(self._links) < _MOST_LINKS:
            self._links.append(LinkFact(path=printable(path), target=printable(target)))

    def largest(self) -> tuple[FileFact, ...]:
        found = sorted(self._largest, key=lambda item: (-item[0], item[1]))
        return tuple(FileFact(path=printable(path), bytes=size) for size, path in found)

    def report(self) -> PackReport:
        return PackReport(
            files=self.files,
            bytes=self.bytes,
            ignored=len(self.left),
            ignored_bytes=self.ignored_bytes,
            ignored_by=tuple(sorted(set(self.left.values()))),
            largest=self.largest(),
            links=tuple(self._links),
            links_out=self._links_out,
        )


def _write(root: Directory, sink: _Sink, tally: _Tally) -> None:
    tracked = TrackedFiles.of(tracked_files(root.path))
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=sink, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive,
    ):
        for found in walk(root, tracked, on_left_out=tally.left_out):
            _add(archive, root.path, found, tally)
        tally.unpacked = zipped.tell()


def _add(archive: tarfile.TarFile, root: Path, found: FoundPath, tally: _Tally) -> None:
    entry = found.entry
    facts = entry.stat(follow_symlinks=False)
    member = tarfile.TarInfo(found.path)
    member.mtime = _MEMBER_TIME
    member.mode = 0o755 if stat.S_ISDIR(facts.st_mode) or facts.st_mode & stat.S_IXUSR else 0o644
    if entry.is_symlink():
        member.type, member.linkname = tarfile.SYMTYPE, _link_target(root, found, tally)
        archive.addfile(member)
        tally.packed(found.path, 0)
    elif stat.S_ISDIR(facts.st_mode):
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
        tally.paths.add(found.path)
    elif stat.S_ISREG(facts.st_mode):
        _add_file(archive, member, found, tally)
    else:
        tally.left_out(found.path, LeftOut("built in: sockets, pipes and devices", final=True), 0)


def _link_target(root: Path, found: FoundPath, tally: _Tally) -> str:
    """Return a link's target: as written, but relative if it is an absolute path inside the working directory."""
    path = found.path
    target = os.readlink(found.entry.name, dir_fd=found.folder.descriptor)
    folder = os.path.dirname(path)  # noqa: PTH120 -- a name, not a path here
    if os.path.isabs(target):  # noqa: PTH117 -- as above
        inside = os.path.relpath(os.path.normpath(target), root)
        if not _leads_out(inside):
            return os.path.relpath(inside, folder or ".")
    elif not _leads_out(os.path.normpath(os.path.join(folder, target))):  # noqa: PTH118 -- not to be resolved
        return target
    tally.leads_out(path, target)
    return target


def _leads_out(place: str) -> bool:
    return place == ".." or place.startswith("../")


def _add_file(archive: tarfile.TarFile, member: tarfile.TarInfo, found: FoundPath, tally: _Tally) -> None:
    try:
        file = os.fdopen(found.folder.open_file(found.entry.name, os.O_RDONLY), "rb")
    except OSError as error:
        raise unreadable(member.name, error) from None
    with file:
        before = os.fstat(file.fileno())
        if looks_secret(member.name) or holds_private_key(file.read(HEAD)):
            tally.secrets.append(member.name)
        file.seek(0)
        member.size = before.st_size
        tally.packed(member.name, before.st_size)
        try:
            archive.addfile(member, file)
        except OSError as error:
            if error.args == ("unexpected end of data",):  # tarfile's message for a file that became shorter
                raise _changed(member.name) from None
            raise
        after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise _changed(member.name)


def _changed(path: str) -> ConflictError:
    return ConflictError(
        f"{printable(path)} in the working directory was changed while it was packed",
        hint=f"wait until it is complete, or leave it out with a line in .raylaunchignore: /{printable(path)}",
    )


async def upload(  # noqa: PLR0913 -- what goes where, and callbacks
    transport: Transport,
    packed: Packed,
    *,
    retry: Retry,
    on_start: Callable[[int], Awaitable[None]] = allow_upload,
    on_progress: OnProgress = no_progress,
    what: str = "code",
) -> int:
    """Send a package unless the cluster has it, starting where an earlier upload stopped; return the bytes sent.

    `what` is its name for `on_progress`; `on_start` is called with the number of bytes to send, before the first.

    Raises:
        TransferError: it did not arrive as it was sent.
    """
    path = f"/v1/packages/{packed.sha256}"
    answer = await retry(lambda: transport.request("HEAD", path))
    have, sent = answer.number("X-Have"), 0
    if answer.header("X-Complete") == "1":
        return 0
    await on_start(packed.bytes - have)
    while True:
        on_progress(what, have, packed.bytes)
        packed.file.seek(have)
        data = packed.file.read(CHUNK)
        answer = await _put(transport, path, packed.bytes, have, data, retry=retry)
        if answer.status == _CONFLICT:
            have = _other_offset(answer, have)  # a response was lost, or somebody else is sending the same package
            continue
        facts = answer.read(_Have)
        sent, have = sent + len(data), facts["have"]
        if facts["complete"]:
            on_progress(what, packed.bytes, packed.bytes)
            return sent


async def _put(  # noqa: PLR0913 -- what goes where
    transport: Transport, path: str, total: int, offset: int, data: bytes, *, retry: Retry
) -> Response:
    params = {"offset": offset, "total": total}
    return await retry(lambda: transport.request("PUT", path, params=params, content=data, allowed=(_CONFLICT,)))


def _other_offset(answer: Response, offset: int) -> int:
    have = answer.number("X-Have", offset)
    if have == offset:
        msg = f"the cluster refused the code at byte {offset} and did not report where to continue"
        raise TransferError(msg, hint="repeat the command")
    return have
