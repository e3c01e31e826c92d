"""Downloads of a job's files into a folder: names are checked, links never followed, content verified.

Nothing from the head is trusted: names stay inside the folder, sizes and checksums are compared with the data. An
existing file with other content is kept unless it may be replaced; this does not stop the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import errno
import fnmatch
import os
import re
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from raylaunch.client.sensitive import FetchedFiles
from raylaunch.client.transport import OnProgress, Transport
from raylaunch.contract import OUTPUTS
from raylaunch.errors import ConflictError, NotFoundError, StorageError, TransferError
from raylaunch.files import Directory, sha256_of
from raylaunch.models.job import Artifact

_PARTIAL = 206
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLAIN = re.compile(r"[A-Za-z0-9_.:/+@=-]{1,200}")
_LONGEST_NAME = 200
"""Bytes of a name; the name of its ``.part`` file is longer."""
_OURS = ".raylaunch"
_SHOWN = 20
_SAVE_EVERY_S = 2.0
_RANGES = ".ranges"
"""After the name of a part: the file that lists the ranges that it has (`raylaunch.ssh.ranges`)."""
LARGE_BYTES = 256 * 1024 * 1024
"""From this size on, several connections are worth their start, which takes about a second."""
_REPEAT = "repeat the command; if it fails again, the job's files or the cluster are damaged"


class Downloaded(NamedTuple):
    """One downloaded file."""

    path: str
    """Its name in the cluster."""
    local: Path
    bytes: int
    fetched: bool
    """False if the same file was here already."""
    verified: bool
    """Whether its checksum was known and matches."""
    sha256: str = ""
    """The expected checksum; empty if none was known."""


class IncompleteDownloadError(TransferError):
    """Some of the requested files were not downloaded; the others were.

    Args:
        problems: the reason for each file, by its name in the cluster.
        done: the files that were downloaded.
        hint: what to do.
    """

    def __init__(self, problems: dict[str, str], done: tuple[Downloaded, ...], *, hint: str) -> None:
        lines = [f"{name!r}: {why}" for name, why in list(problems.items())[:_SHOWN]]
        more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        many = f"{len(problems)} files were not downloaded:\n"
        super().__init__(
            "\n".join([*lines, *more]) if len(problems) == 1 else many + "\n".join([*lines, *more]), hint=hint
        )
        self.problems = problems
        self.done = done


class FileRefusedError(TransferError):
    """Why one file is not downloaded; `kept` if it would replace an existing file."""

    def __init__(self, why: str, *, kept: bool = False) -> None:
        super().__init__(why)
        self.kept = kept


def checked_name(artifact: Artifact, name: str, *, hidden: bool) -> tuple[str, ...]:
    """Return the parts of a file's name below the folder.

    Args:
        artifact: the file, as the head describes it.
        name: its name here.
        hidden: whether a part of the name may start with a dot.

    Raises:
        FileRefusedError: the name leads out of the folder or cannot be one, or size or checksum cannot be true.
    """
    parts = tuple(name.split("/"))
    if any(part in {"", ".", ".."} or "\x00" in part for part in parts):
        msg = "its name leads out of the folder"
        raise FileRefusedError(msg)
    if any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in parts):
        msg = "its name is too long"
        raise FileRefusedError(msg)
    if parts[0] == _OURS or (not hidden and any(part.startswith(".") for part in parts)):
        msg = "its name is hidden: a part of it starts with a dot"
        raise FileRefusedError(msg)
    if artifact.bytes < 0 or (artifact.sha256 and not _SHA256.fullmatch(artifact.sha256)):
        msg = "its size or checksum in the cluster is invalid"
        raise FileRefusedError(msg)
    return parts


class Download:
    """One download of files of one job; a problem with a file does not stop the others.

    Args:
        transport: to the controller.
        job: the job's id.
        retry: retries a call while there is no response.
        replace: whether to replace existing files, also in a folder with files of another job.
        hidden: whether names may have a part that starts with a dot.
        over_ssh: name of the cluster if its head is reached over SSH, else empty.
        on_progress: called with the progress of each file.
    """

    def __init__(  # noqa: PLR0913 -- what goes where
        self,
        transport: Transport,
        job: str,
        *,
        retry: Callable[[Callable[[], Awaitable[Downloaded]]], Awaitable[Downloaded]],
        replace: bool,
        hidden: bool,
        over_ssh: str,
        on_progress: OnProgress,
    ) -> None:
        self._transport = transport
        self._job = job
        self._retry = retry
        self._replace = replace
        self._hidden = hidden
        self._over_ssh = over_ssh
        self._on_progress = on_progress
        self._problems: dict[str, str] = {}
        self._kept = False

    async def into(self, dest: Path | Directory, files: Sequence[tuple[Artifact, str]]) -> tuple[Downloaded, ...]:
        """Download files, each with its name here, into a folder, which is created; a `Directory` stays open.

        Raises:
            ConflictError: the folder has files of another job.
            IncompleteDownloadError: some were not downloaded.
            StorageError: the folder cannot be opened or written.
        """
        try:
            folder = _opened(dest)
        except OSError as error:
            msg = f"{error.filename or dest} cannot be downloaded into: {error.strerror}"
            raise StorageError(msg, hint="name the folder itself, or choose another folder to download into") from None
        with folder:
            record = FetchedFiles(folder)
            others = record.of_others(self._job)
            if others and not self._replace:
                msg = f"{folder.path} has files of job {', '.join(others[:3])}; nothing was downloaded"
                raise ConflictError(msg, hint="choose another folder to download into, or use this one with --force")
            done = await self._all(files, folder, record)
        if self._problems:
            hint = "replace existing files with --force, or choose another folder" if self._kept else _REPEAT
            raise IncompleteDownloadError(self._problems, tuple(done), hint=hint)
        return tuple(done)

    async def _all(
        self, files: Sequence[tuple[Artifact, str]], folder: Directory, record: FetchedFiles
    ) -> list[Downloaded]:
        done: list[Downloaded] = []
        saved_at = time.monotonic()
        try:
            for artifact, name in files:
                try:
                    done.append(await self._one(artifact, name, folder, record))
                except TransferError as error:
                    self._problems[artifact.path] = error.message
                    self._kept = self._kept or (isinstance(error, FileRefusedError) and error.kept)
                if time.monotonic() - saved_at > _SAVE_EVERY_S:
                    _save(record)
                    saved_at = time.monotonic()
        finally:
            _save(record)
        return done

    async def _one(self, artifact: Artifact, name: str, root: Directory, record: FetchedFiles) -> Downloaded:
        *above, last = checked_name(artifact, name, hidden=self._hidden)
        try:
            with root.below(above, make=True) as folder:
                here, target = folder.stat(last), folder.path / last
                if here is not None and await asyncio.to_thread(_is_same, folder, last, here, artifact):
                    sha256 = artifact.sha256
                    return Downloaded(
                        artifact.path, target, artifact.bytes, fetched=False, verified=True, sha256=sha256
                    )
                if here is not None and stat.S_ISDIR(here.st_mode):
                    msg = f"{target} is a folder"
                    raise FileRefusedError(msg)
                if here is not None and not (self._replace or record.is_unchanged(self._job, name, here)):
                    msg = f"{target} already exists with other content; it was kept"
                    raise FileRefusedError(msg, kept=True)
                found = await self._retry(lambda: self._fetch(artifact, folder, last))
                written = folder.stat(last)
        except OSError as error:
            raise _refused(artifact, root.path / name, error) from None
        if written is not None:
            record.add(self._job, name, written)
        return found

    async def _fetch(self, artifact: Artifact, folder: Directory, name: str) -> Downloaded:
        """Download one file into a ``.part`` next to its place, verify and rename it. An existing part is continued."""
        part = f".{name}.{(artifact.sha256 or 'growing')[:12]}.part"
        _remove_foreign_part(folder, part, keep=bool(artifact.sha256))
        url = f"/v1/jobs/{quote(self._job, safe='')}/files/{quote(artifact.path)}"
        large = bool(self._over_ssh) and artifact.bytes >= LARGE_BYTES
        if artifact.sha256 and (large or folder.has(f"{part}{_RANGES}")):
            from raylaunch.client.parallel_download import download_ranges  # noqa: PLC0415 -- it loads SSH

            sha256 = artifact.sha256
            found = await download_ranges(
                self._transport, url, artifact, folder, part, cluster=self._over_ssh, on_progress=self._on_progress
            )
        else:
            sha256 = await self._fetch_whole(url, artifact, folder, part)
            found = await asyncio.to_thread(_sha256_in, folder, part) if sha256 else ""
        if found != sha256:
            folder.unlink(part)
            msg = (
                f"it did not arrive as it was sent: its sha256 is {found[:12]}…, not {sha256[:12]}…; repeat the command"
            )
            raise FileRefusedError(msg)
        folder.replace(part, name)
        size, verified = _size(folder, name), bool(sha256)
        return Downloaded(artifact.path, folder.path / name, size, fetched=True, verified=verified, sha256=sha256)

    async def _fetch_whole(self, url: str, artifact: Artifact, folder: Directory, part: str) -> str:
        """Append the missing bytes to `part`, never more than announced; return the checksum if one is known."""
        have = _size(folder, part)
        if have >= artifact.bytes and have:
            return artifact.sha256
        headers = {"Range": f"bytes={have}-"} if have else {}
        async with self._transport.stream(url, headers=headers) as body:
            resumed = body.status == _PARTIAL
            done = have if resumed else 0
            flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if resumed else os.O_TRUNC)
            with os.fdopen(folder.open_file(part, flags), "ab" if resumed else "wb") as file:
                async for data in body.chunks():
                    file.write(data[: max(0, artifact.bytes - done)])
                    done += len(data)
                    self._on_progress(artifact.path, min(done, artifact.bytes), artifact.bytes)
                    if done > artifact.bytes:
                        break
            stated = body.header("X-Sha256")
        if artifact.sha256 or done != artifact.bytes:
            return artifact.sha256  # a file that has grown since it was listed is here as it was then
        return stated if _SHA256.fullmatch(stated) else ""


def _opened(dest: Path | Directory) -> Directory:
    return Directory.open(dest, make=True) if isinstance(dest, Path) else dest.below(())


def _save(record: FetchedFiles) -> None:
    with contextlib.suppress(OSError):  # without the record, the files count as the person's own
        record.save()


def _refused(artifact: Artifact, target: Path, error: OSError) -> StorageError | FileRefusedError:
    if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG}:
        return FileRefusedError(f"{error.filename or target} cannot be written: {error.strerror}")
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    msg = f"{artifact.path!r} cannot be written to {target}: {'the disk is full' if full else error.strerror}"
    resume = "free some space and repeat the command: it continues where it stopped"
    return StorageError(msg, hint=resume if full else "choose another folder to download into")


def _remove_foreign_part(folder: Directory, part: str, *, keep: bool) -> None:
    """Remove a part that no earlier download wrote: not a regular file, with other links, or of another owner."""
    for name in (part, f"{part}{_RANGES}"):
        found = folder.stat(name)
        if found is None:
            continue
        plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid()
        if not keep or not plain:
            folder.unlink(name)


def _size(folder: Directory, name: str) -> int:
    found = folder.stat(name)
    return found.st_size if found is not None else 0


def _is_same(folder: Directory, name: str, here: os.stat_result, artifact: Artifact) -> bool:
    known = artifact.sha256 and stat.S_ISREG(here.st_mode) and here.st_size == artifact.bytes
    return bool(known) and _sha256_in(folder, name) == artifact.sha256


def _sha256_in(folder: Directory, name: str) -> str:
    """Return the sha256 of a file in hexadecimal digits; memory stays flat."""
    return sha256_of(folder.open_file(name, os.O_RDONLY))


def chosen(files: list[Artifact], wanted: tuple[str, ...], *, everything: bool) -> list[Artifact]:
    """Return the files that were asked for: by name, folder or glob; without a name the outputs, or all, that are kept.

    Raises:
        NotFoundError: a name fits no file.
    """
    if not wanted:
        files = [file for file in files if not file.left]
    if everything and not wanted:
        return files
    oldest_first = sorted(files, key=lambda file: file.attempt)
    if not wanted:
        return list({local_name(file): file for file in oldest_first if file.kind == "output"}.values())
    found: dict[str, Artifact] = {}
    for name in wanted:
        fitting = [file for file in oldest_first if _fits(file, name) and (not file.withheld or is_named(file, name))]
        if not fitting:
            raise _no_such_file(name, files)
        found.update({local_name(file): file for file in fitting})
    return list(found.values())


def local_name(artifact: Artifact) -> str:
    """Return what a downloaded file is called: an output as the job named it, another file as in the store."""
    head, found, tail = artifact.path.partition(f"{OUTPUTS}/")
    return tail if artifact.kind == "output" and found and head.count("/") <= 1 else artifact.path


def _fits(file: Artifact, name: str) -> bool:
    bare = name.rstrip("/")
    return is_named(file, bare) or any(
        path.startswith(f"{bare}/") or fnmatch.fnmatchcase(path, name) for path in _names_of(file)
    )


def is_named(file: Artifact, name: str) -> bool:
    """Return whether `name` is the whole name of a file, in one of its forms."""
    return name in _names_of(file)


def _names_of(file: Artifact) -> tuple[str, ...]:
    return file.path, local_name(file), file.path.partition("/")[2]


def _no_such_file(name: str, files: list[Artifact]) -> NotFoundError:
    named = [local_name(file) for file in files]
    plain = [one for one in named if _PLAIN.fullmatch(one)]  # a job must not write sentences into a hint
    close = difflib.get_close_matches(name, plain, n=3, cutoff=0.3)
    near = f" (nearest: {', '.join(close)})" if close else ""
    return NotFoundError(f"no file matches {name!r}{near}", hint="raylaunch files lists the job's files")
