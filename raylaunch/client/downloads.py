"""Files of a job, brought into a folder: checked before they come, never through a link, verified before they count.

Nothing that the head says is taken as it is: names stay inside the folder, sizes and checksums are compared with what
arrives. A file that is there already and is something else is kept, unless it is to be replaced; the others still come.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import errno
import fnmatch
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import quote

from raylaunch.client.sensitive import FetchedFiles
from raylaunch.client.transfer import OnProgress, no_progress
from raylaunch.client.transport import Transport
from raylaunch.contract import OUTPUTS
from raylaunch.errors import ConflictError, NotFoundError, StorageError, TransferError
from raylaunch.files import Directory
from raylaunch.models.job import Artifact

_PARTIAL = 206
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLAIN = re.compile(r"[A-Za-z0-9_.:/+@=-]{1,200}")
_LONGEST_NAME = 200
"""Bytes of a name; a part's is some longer."""
_OURS = ".raylaunch"
_SHOWN = 20
_SAVE_EVERY_S = 2.0
_ASK = "repeat the command; what stays wrong is the job's or the cluster's"


class RangeDownloader(Protocol):
    """Brings large files in ranges, over several connections."""

    def wants(self, artifact: Artifact, folder: Directory, part: str) -> bool:
        """Whether a file, and what has come of it, is one to be brought that way."""

    async def fetch(  # noqa: PLR0913 -- what goes where
        self, wire: Transport, url: str, artifact: Artifact, folder: Directory, part: str, *, on_progress: OnProgress
    ) -> str:
        """Bring what is missing of the part, and return the sha256 of all of it."""


class Downloaded(NamedTuple):
    """One file that is here now."""

    path: str
    """Its name in the cluster."""
    local: Path
    bytes: int
    fetched: bool
    """False when the same file was here already."""
    verified: bool
    """Whether its checksum was known, and agrees."""
    sha256: str = ""
    """What it was verified against; empty where no checksum was known."""


class IncompleteDownloadError(TransferError):
    """Some of the files that were asked for are not here; the others are.

    Args:
        problems: why, by each file's name in the cluster.
        done: those that are here.
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


class NotTakenError(TransferError):
    """Why one file is not downloaded; `kept` where what is here in its place may be replaced."""

    def __init__(self, why: str, *, kept: bool = False) -> None:
        super().__init__(why)
        self.kept = kept


def checked_name(artifact: Artifact, name: str, *, hidden: bool) -> tuple[str, ...]:
    """Return the parts of the name that a file gets below the folder.

    Args:
        artifact: the file, as the head describes it.
        name: what it is to be called here.
        hidden: whether a part of the name may start with a dot.

    Raises:
        NotTakenError: the name leads out of the folder or cannot be one, or size or checksum cannot be true.
    """
    parts = tuple(name.split("/"))
    if any(part in {"", ".", ".."} or "\x00" in part for part in parts):
        msg = "its name leads out of the folder"
        raise NotTakenError(msg)
    if any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in parts):
        msg = "its name is too long"
        raise NotTakenError(msg)
    if parts[0] == _OURS or (not hidden and any(part.startswith(".") for part in parts)):
        msg = "its name is hidden: a part of it starts with a dot"
        raise NotTakenError(msg)
    if artifact.bytes < 0 or (artifact.sha256 and not _SHA256.fullmatch(artifact.sha256)):
        msg = "the cluster gives it a size or a checksum that cannot be"
        raise NotTakenError(msg)
    return parts


MayReplace = Callable[[os.stat_result], bool]
"""Whether the file that is in the place of another one may be replaced."""


class DownloadOne(Protocol):
    """Downloads one file; `download`, with its connection bound."""

    async def __call__(self, artifact: Artifact, folder: Directory, name: str, *, replace: MayReplace) -> Downloaded:
        """Raise as `download`."""


async def download_all(  # noqa: PLR0913 -- what goes where
    bring: DownloadOne,
    job: str,
    files: Sequence[tuple[Artifact, str]],
    dest: Path | Directory,
    *,
    replace: bool,
    hidden: bool,
) -> tuple[Downloaded, ...]:
    """Bring files into a folder, which is created; what is wrong with one keeps no other from coming.

    Args:
        bring: downloads one file.
        job: whose they are.
        files: each with its name here.
        dest: the folder; a `Directory` stays open.
        replace: whether files that are something else are replaced, also in a folder that holds another job's files.
        hidden: whether names may have a part that starts with a dot.

    Raises:
        ConflictError: the folder holds another job's files.
        IncompleteDownloadError: some were not brought.
        StorageError: the folder cannot be opened or written.
    """
    try:
        folder = _opened(dest)
    except OSError as error:
        msg = f"{error.filename or dest} cannot be downloaded into: {error.strerror}"
        raise StorageError(msg, hint="name the folder itself, or choose another folder to download into") from None
    with folder:
        return await _Filling(bring, job, folder, replace=replace, hidden=hidden).all(files)


def _opened(dest: Path | Directory) -> Directory:
    return Directory.open(dest, make=True) if isinstance(dest, Path) else dest.below(())


class _Filling:
    """One folder, and what has become of each file so far."""

    def __init__(self, bring: DownloadOne, job: str, folder: Directory, *, replace: bool, hidden: bool) -> None:
        self._bring = bring
        self._job = job
        self._folder = folder
        self._replace = replace
        self._hidden = hidden
        self._record = FetchedFiles(folder)
        self._problems: dict[str, str] = {}
        self._kept = False

    async def all(self, files: Sequence[tuple[Artifact, str]]) -> tuple[Downloaded, ...]:
        others = self._record.of_others(self._job)
        if others and not self._replace:
            msg = f"{self._folder.path} holds files of job {', '.join(others[:3])}, and was not downloaded into"
            raise ConflictError(msg, hint="choose another folder to download into; --force uses this one all the same")
        done: list[Downloaded] = []
        saved_at = time.monotonic()
        try:
            for artifact, name in files:
                done += await self._one(artifact, name)
                if time.monotonic() - saved_at > _SAVE_EVERY_S:
                    self._save()
                    saved_at = time.monotonic()
        finally:
            self._save()
        if self._problems:
            hint = "--force replaces files that are here; or choose another folder" if self._kept else _ASK
            raise IncompleteDownloadError(self._problems, tuple(done), hint=hint)
        return tuple(done)

    async def _one(self, artifact: Artifact, name: str) -> list[Downloaded]:
        try:
            *above, last = checked_name(artifact, name, hidden=self._hidden)
            with self._below(artifact, above) as folder:
                found = await self._bring(artifact, folder, last, replace=partial(self._may_replace, name))
                here = folder.stat(last)
        except NotTakenError as problem:
            self._problems[artifact.path] = str(problem)
            self._kept = self._kept or problem.kept
            return []
        except TransferError as error:
            self._problems[artifact.path] = error.message
            return []
        if found.fetched and here is not None:
            self._record.add(self._job, name, here)
        return [found]

    def _below(self, artifact: Artifact, above: list[str]) -> Directory:
        try:
            return self._folder.below(above, make=True)
        except OSError as error:
            raise _refused(artifact, self._folder.path.joinpath(*above), error) from None

    def _may_replace(self, name: str, here: os.stat_result) -> bool:
        return self._replace or self._record.is_unchanged(self._job, name, here)

    def _save(self) -> None:
        with contextlib.suppress(OSError):  # the files are here; without the note they count as the person's own
            self._record.save()


async def download(  # noqa: PLR0913 -- what goes where
    wire: Transport,
    job: str,
    artifact: Artifact,
    folder: Directory,
    name: str,
    *,
    replace: MayReplace,
    wide: RangeDownloader | None = None,
    on_progress: OnProgress = no_progress,
) -> Downloaded:
    """Fetch one file: into a ``.part`` next to its place, verified, then renamed. A part that is there is continued.

    Args:
        wire: to the controller.
        job: the job's id.
        artifact: the file, as the head describes it; its name and figures have been checked.
        folder: where it goes.
        name: what it is called there.
        replace: whether a file that is there, and is something else, may be replaced.
        wide: brings those that it wants; the others come in one piece.
        on_progress: told how far it is.

    Raises:
        NotTakenError: something else is there and may not be replaced; or the bytes that came are not those announced.
        StorageError: it cannot be written here.
    """
    target = folder.path / name
    try:
        if await asyncio.to_thread(_is_here, folder, name, artifact, replace):
            sha256 = artifact.sha256
            return Downloaded(artifact.path, target, artifact.bytes, fetched=False, verified=True, sha256=sha256)
        part = f".{name}.{(artifact.sha256 or 'growing')[:12]}.part"
        _own_part(folder, part, keep=bool(artifact.sha256))
        url = f"/v1/jobs/{quote(job, safe='')}/files/{quote(artifact.path)}"
        if wide is not None and await asyncio.to_thread(wide.wants, artifact, folder, part):
            sha256, found = (
                artifact.sha256,
                await wide.fetch(wire, url, artifact, folder, part, on_progress=on_progress),
            )
        else:
            sha256 = await _fetch(wire, url, artifact, folder, part, on_progress=on_progress)
            found = await asyncio.to_thread(_sha256_in, folder, part) if sha256 else ""
        if found != sha256:
            folder.unlink(part)
            msg = (
                f"it did not arrive as it was sent: its sha256 is {found[:12]}…, not {sha256[:12]}…; repeat the command"
            )
            raise NotTakenError(msg)
        folder.replace(part, name)
        return Downloaded(
            artifact.path, target, _size(folder, name), fetched=True, verified=bool(sha256), sha256=sha256
        )
    except OSError as error:
        raise _refused(artifact, target, error) from None


def _refused(artifact: Artifact, target: Path, error: OSError) -> StorageError | NotTakenError:
    if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG}:
        return NotTakenError(f"{error.filename or target} cannot be written: {error.strerror}")
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    msg = f"{artifact.path!r} cannot be written to {target}: {'the disk is full' if full else error.strerror}"
    go_on = "free some space and repeat the command: it goes on where it stopped"
    return StorageError(msg, hint=go_on if full else "choose another folder to download into")


async def _fetch(  # noqa: PLR0913 -- what goes where
    wire: Transport, url: str, artifact: Artifact, folder: Directory, part: str, *, on_progress: OnProgress
) -> str:
    """Append to `part` what is missing, never more than was announced; return the checksum, where one is known."""
    have = _size(folder, part)
    if have >= artifact.bytes and have:
        return artifact.sha256
    headers = {"Range": f"bytes={have}-"} if have else {}
    async with wire.stream(url, headers=headers) as body:
        resumed = body.status == _PARTIAL
        done = have if resumed else 0
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if resumed else os.O_TRUNC)
        with os.fdopen(folder.open_file(part, flags), "ab" if resumed else "wb") as file:
            async for data in body.chunks():
                file.write(data[: max(0, artifact.bytes - done)])
                done += len(data)
                on_progress(artifact.path, min(done, artifact.bytes), artifact.bytes)
                if done > artifact.bytes:
                    break
        stated = body.header("X-Sha256")
    if artifact.sha256 or done != artifact.bytes:
        return artifact.sha256  # of a file that has grown since it was listed, what was listed is here
    return stated if _SHA256.fullmatch(stated) else ""


def _own_part(folder: Directory, part: str, *, keep: bool) -> None:
    """Remove a part that an earlier download may not have left: no plain file, linked from elsewhere, not ours."""
    for name in (part, f"{part}.ranges"):
        found = folder.stat(name)
        if found is None:
            continue
        plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid()
        if not keep or not plain:
            folder.unlink(name)


def _size(folder: Directory, name: str) -> int:
    found = folder.stat(name)
    return found.st_size if found is not None else 0


def _is_here(folder: Directory, name: str, artifact: Artifact, replace: MayReplace) -> bool:
    here = folder.stat(name)
    if here is None:
        return False
    plain = stat.S_ISREG(here.st_mode)
    if plain and artifact.sha256 and here.st_size == artifact.bytes and _sha256_in(folder, name) == artifact.sha256:
        return True
    if stat.S_ISDIR(here.st_mode):
        msg = f"{folder.path / name} is a folder"
        raise NotTakenError(msg)
    if not replace(here):
        msg = f"{folder.path / name} is there already, and is something else; it was kept"
        raise NotTakenError(msg, kept=True)
    return False


def _sha256_in(folder: Directory, name: str) -> str:
    """Return the sha256 of a file in hexadecimal digits; memory stays flat."""
    digest = hashlib.sha256()
    with os.fdopen(folder.open_file(name, os.O_RDONLY), "rb") as file:
        while data := file.read(1024 * 1024):
            digest.update(data)
    return digest.hexdigest()


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
    plain = [one for one in named if _PLAIN.fullmatch(one)]  # a hint is no place for sentences that a job wrote
    close = difflib.get_close_matches(name, plain, n=3, cutoff=0.3)
    near = f" (nearest: {', '.join(close)})" if close else ""
    return NotFoundError(f"the job has left no file {name!r}{near}", hint="raylaunch files shows what there is")
