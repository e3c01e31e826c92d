"""The journal of a job, one line of JSON per change, flushed before the database is written; and the job's folder.

A line is ``{"seq", "at", "kind", "message", "state", "record", "heavy"}``: `record` is the job at that time without its
heavy fields, and `heavy` has those if they changed. A change without an event has an empty `kind` and the seq of the
previous event. A last line without a newline was not completed and is ignored.
The store's own journal contains what outlives a job's folder: removals, and events of external jobs.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, JsonValue, ValidationError

from raylaunch.controller.store.record import JobRecord, heavy_json, light_json
from raylaunch.errors import StorageError
from raylaunch.files import sync
from raylaunch.models.fields import Count, Moment
from raylaunch.models.job import Event
from raylaunch.models.states import JobState

JOURNAL = "journal.jsonl"


def free_id(jobs: Path, name: str) -> str:
    """Return an unused id for a new job with this name."""
    while True:
        job_id = f"{name}-{base64.b32encode(secrets.token_bytes(4)).decode().lower()[:6]}"
        if not (jobs / job_id).exists():
            return job_id


def make(folder: Path, record: JobRecord) -> None:
    """Create the folder of a new job, with its spec and its uncommitted changes.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(mode=0o700)
    sync(folder.parent)
    if record.spec is not None:
        spec = record.spec.model_dump(mode="json", exclude_defaults=True)
        write_text(folder / "spec.yaml", yaml.safe_dump(spec, sort_keys=False, allow_unicode=True))
    if record.git is not None and record.git.diff:
        write_text(folder / "git.diff", record.git.diff)


def write_packages(folder: Path, packages: Sequence[str]) -> None:
    """Write the packages of the job's environment; the record has them too, so a failure is harmless."""
    with contextlib.suppress(OSError):
        write_text(folder / "packages.txt", "\n".join(packages) + "\n")


def journal_line(
    record: JobRecord, *, event: Event | None, seq: int = 0, note: str = "", heavy: bool = False
) -> JournalLine:
    """Return the journal line of a job as it is now; a change without an event has the previous `seq`."""
    return JournalLine(
        seq=event.seq if event is not None else seq,
        at=record.updated_at,
        kind=event.kind if event is not None else "",
        message=event.message if event is not None else note,
        state=record.state,
        record=light_json(record),
        heavy=heavy_json(record) if heavy else None,
    )


class JournalLine(BaseModel):
    """One change of one job."""

    seq: Count
    at: Moment
    kind: str
    message: str = ""
    job: str = ""
    state: JobState | None = None
    record: dict[str, JsonValue] | None = None
    heavy: dict[str, JsonValue] | None = None

    def encode(self) -> bytes:
        """Return the line's bytes, including the newline."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), ensure_ascii=False).encode() + b"\n"


def line_of(event: Event) -> JournalLine:
    """Return a line of the store's own journal, for an event without a job's folder."""
    return JournalLine(
        seq=event.seq, at=event.at, kind=event.kind, message=event.message, job=event.job, state=event.state
    )


def write_problem(path: Path, error: OSError) -> StorageError:
    """Return the error for a failed write of `path`."""
    hint = "nothing was recorded; check the disk and the permissions of the store, then try again"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        hint = "nothing was recorded; free space on that disk (raylaunch du shows the usage of jobs), then try again"
    return StorageError(f"cannot write {path}: {error.strerror}", hint=hint)


def append(path: Path, line: JournalLine, *, durable: bool = True) -> tuple[int, int]:
    """Append `line` to the journal and, if `durable`, flush it to disk.

    Returns:
        The journal's size in bytes before and after. An incomplete last line from a crash is removed first.

    Raises:
        StorageError: the disk is full or cannot be written; the journal is unchanged.
    """
    data = line.encode()
    try:
        new = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            before = _cut_torn_line(fd)
            try:
                write_all(fd, data, before)
                if durable:
                    os.fsync(fd)
            except OSError:
                os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)
        if new:
            sync(path.parent)
    except OSError as error:
        raise write_problem(path, error) from error
    return before, before + len(data)


def cut(path: Path, size: int) -> None:
    """Truncate the journal to `size` bytes."""
    os.truncate(path, size)


def cut_torn_line(path: Path) -> int:
    """Remove an incomplete last line, and return the journal's size in bytes."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _cut_torn_line(fd)
    finally:
        os.close(fd)


def read(path: Path) -> Iterator[JournalLine | None]:
    """Yield the complete lines, oldest first; None for a line that cannot be read."""
    with path.open("rb") as file:
        for data in file:
            if not data.endswith(b"\n"):
                return
            yield _parse(data)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def write_text(path: Path, text: str) -> None:
    """Write a small file for people, readable only by its owner."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def _parse(data: bytes) -> JournalLine | None:
    try:
        return JournalLine.model_validate(json.loads(data))
    except (ValueError, ValidationError, RecursionError):
        return None


def _cut_torn_line(fd: int) -> int:
    end = os.lseek(fd, 0, os.SEEK_END)
    whole = end
    while whole > 0:
        start = max(0, whole - 65536)
        newline = os.pread(fd, whole - start, start).rfind(b"\n")
        if newline >= 0:
            whole = start + newline + 1
            break
        whole = start
    if whole != end:
        os.ftruncate(fd, whole)
    return whole
