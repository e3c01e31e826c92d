"""Bytes to and from the cluster: uploads and downloads that go on where they stopped, and are verified at the end."""

from __future__ import annotations

import asyncio
import difflib
import errno
import fnmatch
import hashlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import quote

from raylaunch.errors import ConflictError, NotFoundError, StorageError, TransferError
from raylaunch.runner.contract import OUTPUTS
from raylaunch.state import Artifact
from raylaunch.wire import Answer, Wire

if TYPE_CHECKING:
    from raylaunch.packing import Packed

OnProgress = Callable[[str, int, int], None]
"""Called with what travels, bytes done, and bytes in all."""
Patient = Callable[[Callable[[], Awaitable[Answer]]], Awaitable[Answer]]
"""Repeats a request while nothing answers."""


class Wide(Protocol):
    """Brings large files in ranges, over several connections."""

    def wants(self, artifact: Artifact, part: Path) -> bool:
        """Whether a file, and what has come of it, is one to be brought that way."""

    async def fetch(self, wire: Wire, url: str, artifact: Artifact, part: Path, on_progress: OnProgress) -> str:
        """Bring what is missing of the part, and return the sha256 of all of it."""


CHUNK = 8 * 1024 * 1024
_CONFLICT = 409
_PARTIAL = 206
_NOT_SATISFIABLE = 416


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


def no_progress(_what: str, _done: int, _total: int, /) -> None:
    """Show nothing."""


async def _begin(_bytes: int) -> None:
    pass


async def upload(  # noqa: PLR0913 -- what goes where, and who is told
    wire: Wire,
    packed: Packed,
    *,
    patient: Patient,
    on_begin: Callable[[int], Awaitable[None]] = _begin,
    on_progress: OnProgress = no_progress,
    what: str = "code",
) -> int:
    """Send a package unless the cluster has it, from where an earlier upload stopped. Return the bytes sent.

    `what` is told of progress, and `on_begin` how many bytes are to be sent, before the first.

    Raises:
        TransferError: it did not arrive as it was sent.
    """
    path = f"/v1/packages/{packed.sha256}"
    answer = await patient(lambda: wire.ask("HEAD", path))
    have, sent = answer.number("X-Have"), 0
    if answer.header("X-Complete") == "1":
        return 0
    await on_begin(packed.bytes - have)
    while True:
        on_progress(what, have, packed.bytes)
        packed.file.seek(have)
        data = packed.file.read(CHUNK)
        answer = await _put(wire, path, packed.bytes, have, data, patient=patient)
        if answer.status == _CONFLICT:
            have = _other_offset(answer, have)  # an answer was lost on the way, or somebody else sends the same
            continue
        facts = json.loads(answer.body)
        sent, have = sent + len(data), int(facts["have"])
        if facts["complete"]:
            on_progress(what, packed.bytes, packed.bytes)
            return sent


async def _put(  # noqa: PLR0913 -- what goes where
    wire: Wire, path: str, total: int, offset: int, data: bytes, *, patient: Patient
) -> Answer:
    params = {"offset": offset, "total": total}
    return await patient(lambda: wire.ask("PUT", path, params=params, content=data, allowed=(_CONFLICT,)))


def _other_offset(answer: Answer, offset: int) -> int:
    have = answer.number("X-Have", offset)
    if have == offset:
        msg = f"the cluster refused the code at byte {offset} and did not say where to go on"
        raise TransferError(msg, hint="repeat the command")
    return have


def safe_target(dest: Path, path: str) -> Path:
    """Return where a file of the cluster goes below `dest`.

    Raises:
        TransferError: its name would lead out of `dest`.
    """
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or "\x00" in path:
        msg = f"{path!r} was not downloaded: its name leads out of {dest}"
        raise TransferError(msg)
    return dest.joinpath(*parts)


async def download(  # noqa: PLR0913 -- what goes where
    wire: Wire,
    job: str,
    artifact: Artifact,
    target: Path,
    *,
    replace: bool = True,
    wide: Wide | None = None,
    on_progress: OnProgress = no_progress,
) -> Downloaded:
    """Fetch one file: into a ``.part`` beside its place, verified, then renamed. A part that is there is gone on with.

    `wide` brings those that it wants; the others come in one piece.

    Raises:
        ConflictError: something else is there already, and `replace` is False.
        TransferError: the bytes do not have the checksum that the cluster recorded.
        StorageError: it cannot be written here.
    """
    try:
        here = await asyncio.to_thread(_is_here, target, artifact, replace=replace)
        if here:
            sha256 = artifact.sha256
            return Downloaded(artifact.path, target, artifact.bytes, fetched=False, verified=True, sha256=sha256)
        part = _part_of(target, artifact)
        url = f"/v1/jobs/{quote(job, safe='')}/files/{quote(artifact.path)}"
        if wide is not None and await asyncio.to_thread(wide.wants, artifact, part):
            sha256, found = artifact.sha256, await wide.fetch(wire, url, artifact, part, on_progress)
        else:
            sha256 = await _fetch(wire, url, artifact, part, on_progress)
            found = await asyncio.to_thread(file_sha256, part) if sha256 else ""
        _accept(part, target, artifact, sha256, found)
        return Downloaded(artifact.path, target, _size(target), fetched=True, verified=bool(sha256), sha256=sha256)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        why = "the disk is full" if full else f"{error.strerror}"
        msg = f"{artifact.path} cannot be written to {target}: {why}"
        go_on = "free some space and repeat the command: it goes on where it stopped"
        hint = go_on if full else "choose another folder to download into"
        raise StorageError(msg, hint=hint) from None


async def _fetch(wire: Wire, url: str, artifact: Artifact, part: Path, on_progress: OnProgress) -> str:
    """Append to `part` what is missing of it; return the checksum that the controller states, if it does."""
    have = _size(part)
    if have and have >= artifact.bytes:
        return artifact.sha256
    headers = {"Range": f"bytes={have}-"} if have else {}
    async with wire.stream(url, headers=headers) as body:
        resumed = body.status == _PARTIAL
        done = have if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            async for data in body.chunks():
                file.write(data)
                done += len(data)
                on_progress(artifact.path, done, max(done, artifact.bytes))
        return artifact.sha256 or body.header("X-Sha256")


def _part_of(target: Path, artifact: Artifact) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{(artifact.sha256 or 'growing')[:12]}.part")
    if not artifact.sha256:
        part.unlink(missing_ok=True)  # nothing says that what is there belongs to the same bytes
    return part


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_here(target: Path, artifact: Artifact, *, replace: bool) -> bool:
    same = (
        bool(artifact.sha256)
        and target.is_file()
        and target.stat().st_size == artifact.bytes
        and file_sha256(target) == artifact.sha256
    )
    if not same and not replace and os.path.lexists(target):
        msg = f"{artifact.path} was not downloaded: {target} is there already, and is something else"
        raise ConflictError(msg, hint="choose another folder to download into, or move that file away")
    return same


def _accept(part: Path, target: Path, artifact: Artifact, sha256: str, found: str) -> None:
    if found != sha256:
        part.unlink(missing_ok=True)
        msg = f"{artifact.path} did not arrive as it was sent: its sha256 is {found[:12]}…, not {sha256[:12]}…"
        raise TransferError(msg, hint="repeat the command; should it happen again, the file changed in the store")
    part.replace(target)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits; memory stays flat."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        _feed(digest, file)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, file: IO[bytes]) -> None:
    while data := file.read(1024 * 1024):
        digest.update(data)


def chosen(files: list[Artifact], wanted: tuple[str, ...], *, everything: bool) -> list[Artifact]:
    """Return the files that were asked for: by name, folder or glob; without a name the outputs, or all.

    Raises:
        NotFoundError: a name fits no file.
    """
    if everything and not wanted:
        return files
    oldest_first = sorted(files, key=lambda file: file.attempt)
    if not wanted:
        return list({local_name(file): file for file in oldest_first if file.kind == "output"}.values())
    found: dict[str, Artifact] = {}
    for name in wanted:
        fitting = [file for file in oldest_first if _fits(file, name)]
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
    return any(
        path == bare or path.startswith(f"{bare}/") or fnmatch.fnmatchcase(path, name)
        for path in (file.path, local_name(file), file.path.partition("/")[2])
    )


def _no_such_file(name: str, files: list[Artifact]) -> NotFoundError:
    close = difflib.get_close_matches(name, [local_name(file) for file in files], n=3, cutoff=0.3)
    hint = f"nearest: {', '.join(close)}" if close else "raylaunch files shows what there is"
    return NotFoundError(f"the job has left no file {name!r}", hint=hint)
