"""Recovery when the store is opened: the database is brought in line with the journals. And the trash."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from pydantic import ValidationError

from raylaunch.controller.store import database, journal
from raylaunch.controller.store.journal import JOURNAL, JournalLine
from raylaunch.controller.store.record import JobRecord
from raylaunch.models.job import Event

TRASH = "trash"


def move_to_trash(store: Path, job: str) -> None:
    """Move the job's folder to the trash, which is fast; `empty_trash` deletes it."""
    folder = store / "jobs" / job
    if folder.exists():
        (store / TRASH).mkdir(mode=0o700, exist_ok=True)
        folder.rename(store / TRASH / f"{job}-{uuid4().hex[:8]}")


def empty_trash(store: Path) -> None:
    """Delete the files of removed jobs. May take long; may be called from any thread, also while jobs are moved there.

    The folder itself remains, since `move_to_trash` may have just created it.
    """
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(store / TRASH)):
            shutil.rmtree(entry.path, ignore_errors=True)


@dataclass
class _Found:
    adopted: list[str] = field(default_factory=list)
    ahead: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def reconcile(connection: sqlite3.Connection, store: Path, *, damage: str) -> tuple[str, ...]:
    """Bring the database in line with the journals.

    A folder with a journal but no row is added; a journal whose size differs from the one in its row is read again; a
    removal that a crash interrupted is completed.

    Args:
        connection: the open database.
        store: the store's folder.
        damage: what was wrong with a database that had to be replaced; empty if nothing was.

    Returns:
        Messages about what was repaired.
    """
    sizes: dict[str, int] = dict(connection.execute("SELECT id, journal_bytes FROM jobs WHERE NOT is_foreign"))
    folders = {path.parent.name: path for path in (store / "jobs").glob(f"*/{JOURNAL}")}
    found = _Found()
    with database.transaction(connection):
        removed = _apply_store_journal(connection, store / JOURNAL)
        for job in sorted(set(removed) & (set(folders) | set(sizes))):
            if _last_seq(folders.get(job)) <= removed[job]:
                database.drop_job(connection, job)
                move_to_trash(store, job)
                folders.pop(job, None)
        for job, path in sorted(folders.items()):
            if path.stat().st_size != sizes.get(job):
                _apply_journal(connection, job, path, found, new=job not in sizes)
    return _sentences(found, damage)


def _apply_store_journal(connection: sqlite3.Connection, path: Path) -> dict[str, int]:
    removed: dict[str, int] = {}
    if not path.exists():
        return removed
    journal.cut_torn_line(path)
    for line in journal.read(path):
        if line is None:
            continue
        database.put_event(connection, _event(line, line.job))
        if line.kind == "removed":
            removed[line.job] = line.seq
    return removed


def _last_seq(path: Path | None) -> int:
    return max((line.seq for line in journal.read(path) if line), default=0) if path else 0


def _apply_journal(connection: sqlite3.Connection, job: str, path: Path, found: _Found, *, new: bool) -> None:
    size = journal.cut_torn_line(path)
    lines = list(journal.read(path))
    whole = [line for line in lines if line is not None]
    if len(whole) < len(lines):
        found.damaged.append(job)
    if not whole:
        return
    record = _latest(whole)
    if record is None or record.id != job:
        found.unreadable.append(job)
        return
    database.put_job(connection, record, journal_bytes=size)
    for line in whole:
        if line.kind:
            database.put_event(connection, _event(line, job))
    if new:
        found.adopted.append(job)
    elif not found.damaged or found.damaged[-1] != job:
        found.ahead.append(job)


def _latest(lines: Sequence[JournalLine]) -> JobRecord | None:
    heavy = next((line.heavy for line in reversed(lines) if line.heavy is not None), {})
    for line in reversed(lines):
        if line.record is None:
            continue
        try:
            return JobRecord.model_validate({**line.record, **heavy})
        except ValidationError:
            continue
    return None


def _event(line: JournalLine, job: str) -> Event:
    return Event(seq=line.seq, at=line.at, job=job, kind=line.kind, message=line.message, state=line.state)


def _sentences(found: _Found, damage: str) -> tuple[str, ...]:
    messages = []
    if damage:
        messages.append(
            f"The database was damaged ({damage}) and was rebuilt from the journals of {_jobs(found.adopted)}."
        )
    elif found.adopted:
        messages.append(f"Found in the journals and added: {_jobs(found.adopted)} ({_some(found.adopted)}).")
    if found.ahead:
        messages.append(f"Brought up to date from the journals: {_jobs(found.ahead)} ({_some(found.ahead)}).")
    if found.damaged:
        messages.append(f"Journals with damaged lines, which were skipped: {_some(found.damaged)}.")
    if found.unreadable:
        messages.append(f"Journals without a job, which were skipped: {_some(found.unreadable)}.")
    return tuple(messages)


def _jobs(ids: Sequence[str]) -> str:
    return "1 job" if len(ids) == 1 else f"{len(ids)} jobs"


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")  # noqa: PLR2004 -- fits a line
