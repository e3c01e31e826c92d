"""The records of all jobs: a journal in each job's folder is authoritative, SQLite serves reads.

Synchronous, for the event loop's thread only; every call is fast. A change is first written to the journal and flushed,
then to the database. Differences after a crash are repaired at the next start and reported in `Records.repairs`.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from raylaunch.controller.store import database, journal
from raylaunch.controller.store.audit import lock_store
from raylaunch.controller.store.backlog import Backlog, WaitDecision, request_of
from raylaunch.controller.store.database import (
    Filters,
    RetentionRow,
    page_of,
    retention_rows,
    unfinished,
    unfinished_ids,
)
from raylaunch.controller.store.journal import JOURNAL, JournalLine, journal_line
from raylaunch.controller.store.record import HEAVY, JobRecord, StopWishModel, record_from
from raylaunch.controller.store.recovery import move_to_trash, reconcile
from raylaunch.errors import ConflictError, NotFoundError, StorageError
from raylaunch.models.job import Event, EventPage, JobPage, JobView, SubmitRequest, WandbLink
from raylaunch.models.states import Change, JobState

_DB = "raylaunch.db"
_ALL = Filters()
_NEAR_AMONG = 500
"""How many of the latest jobs are compared with a mistyped id or name."""


class Records:
    """All jobs and events of one store. Only one controller at a time can open it."""

    repairs: tuple[str, ...]
    """Messages about what was repaired when the store was opened."""
    backlog: Backlog
    """The queued jobs."""

    def __init__(self, store: Path) -> None:
        """Lock and open the store; create it if it does not exist.

        Raises:
            ConflictError: another controller uses it.
            VersionError: a newer raylaunch wrote its database.
            StorageError: it cannot be opened.
        """
        self.store = store
        self._changed: dict[str, set[asyncio.Event]] = {}
        try:
            (store / "jobs").mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = lock_store(store)
        except OSError as error:
            raise journal.write_problem(store, error) from error
        try:
            self._db, damage = database.open_database(store / _DB)
            self.repairs = reconcile(self._db, store, damage=damage)
            self._seq = int(self._db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])
            external, odd = unfinished(self._db, foreign=True)
            ours, unreadable = unfinished(self._db, foreign=False)
            self._foreign = {record.id: record for record in external}
            self._active: dict[str, JobRecord] = {}
            self.backlog = Backlog()
            for record in ours:
                self._track(record)
            if odd or unreadable:
                self.repairs = (*self.repairs, *odd, *unreadable)
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def cursor(self) -> int:
        """Sequence number of the latest event; 0 before the first."""
        return self._seq

    def folder(self, job_id: str) -> Path:
        """Return the job's folder in the store."""
        return self.store / "jobs" / job_id

    def create(
        self,
        request: SubmitRequest,
        *,
        owner: str,
        wandb: WandbLink | Callable[[str], WandbLink] | None,
        prepare: Callable[[str], None] | None = None,
    ) -> tuple[JobRecord, bool]:
        """Create a queued job.

        Args:
            request: what the client sent. Its secrets are not recorded.
            owner: the job's owner.
            wandb: its W&B run, or a function that returns it for the job's id.
            prepare: called with the job's id before its record is written; if it raises, the job is not created.

        Returns:
            The job, and True; or the existing job with the same owner and request id, and False.

        Raises:
            ConflictError: the request id was used for another spec or package.
            StorageError: it cannot be written; the job is not created.
        """
        earlier = self._of_request(owner, request)
        if earlier is not None:
            return earlier, False
        now = time.time()
        job_id = journal.free_id(self.store / "jobs", request.spec.display_name)
        record = JobRecord(
            id=job_id,
            name=request.spec.display_name,
            owner=owner,
            state=JobState.QUEUED,
            spec=request.spec,
            entrypoint=request.spec.command,
            created_at=now,
            updated_at=now,
            pack=request.pack,
            git=request.git,
            chosen=request.chosen,
            wandb=wandb(job_id) if callable(wandb) else wandb,
            package=request.package,
            request_id=request.request_id,
            wheels=request.wheels,
        )
        folder = self.folder(record.id)
        try:
            journal.make(folder, record)
            if prepare is not None:
                prepare(record.id)
            return self._write(None, record, kind="submitted", note=f"submitted by {owner}"), True
        except BaseException as error:
            move_to_trash(self.store, job_id)
            if isinstance(error, OSError):
                raise journal.write_problem(folder, error) from error
            raise

    def get(self, ref: str, *, owner: str = "") -> JobRecord:
        """Return a job with all its fields; for `ref` and `owner` see `find`.

        Raises:
            NotFoundError: there is none.
        """
        return self.by_id(self.find(ref, owner=owner))

    def find(self, ref: str, *, owner: str = "") -> str:
        """Return the id of the job that a reference refers to.

        Args:
            ref: an id; or a name, for the owner's latest job of that name; or ``last``, for the owner's latest.
            owner: the caller; if they have no such job, anybody's is returned, raylaunch's before external ones.

        Raises:
            NotFoundError: there is none.
        """
        columns = "SELECT id FROM jobs WHERE"
        latest = "ORDER BY created_at DESC, id DESC LIMIT 1"
        row = self._db.execute(f"{columns} id = ?", (ref,)).fetchone()
        if row is None and ref == "last":
            row = self._db.execute(f"{columns} owner = ? AND NOT is_foreign {latest}", (owner,)).fetchone()
            row = row or self._db.execute(f"{columns} NOT is_foreign {latest}").fetchone()
            if row is None:
                msg = "there are no jobs yet"
                raise NotFoundError(msg, hint="submit one: raylaunch run -- python train.py")
        if row is None:
            own_first = latest.replace("ORDER BY", "ORDER BY is_foreign, owner != ?,")
            row = self._db.execute(f"{columns} name = ? {own_first}", (ref, owner)).fetchone()
        if row is None:
            raise _no_job(ref)
        return str(row[0])

    def refs(self) -> list[str]:
        """Return ids and names of the latest jobs, to suggest one for a typo (`database.nearest`)."""
        rows = self._db.execute("SELECT id, name FROM jobs ORDER BY created_at DESC, id DESC LIMIT ?", (_NEAR_AMONG,))
        return list(dict.fromkeys(word for row in rows for word in reversed(row)))

    def by_id(self, job_id: str) -> JobRecord:
        """Return a job by its id, with all its fields.

        Raises:
            NotFoundError: there is no job with this id.
            StorageError: its record cannot be read.
        """
        row = self._db.execute("SELECT light, heavy FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise _no_job(job_id)
        return record_from(*row)

    def light(self, job_id: str) -> JobRecord:
        """Return a job without its heavy fields; an active one comes from memory.

        Raises:
            NotFoundError: there is no job with this id.
        """
        known = self._active.get(job_id) or self._foreign.get(job_id)
        if known is not None:
            return known
        row = self._db.execute("SELECT light FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise _no_job(job_id)
        return record_from(*row)

    def page(self, filters: Filters = _ALL, *, limit: int = 50, cursor: str = "") -> JobPage:
        """Return one page of jobs, newest first, without their heavy fields.

        Args:
            filters: which jobs.
            limit: maximum number of jobs on the page.
            cursor: `JobPage.next_cursor` of the previous page.

        Raises:
            SpecError: the cursor is invalid.
        """
        return page_of(self._db, filters, self._active, limit=limit, cursor=cursor)

    def names(self) -> list[tuple[str, str, JobState]]:
        """Return id, name and state of all of raylaunch's jobs. Slow: do not call it on the event loop."""
        with database.open_read_only(self.store / _DB) as connection:
            rows = connection.execute("SELECT id, name, state FROM jobs WHERE NOT is_foreign")
            return [(job, name, JobState(state)) for job, name, state in rows]

    def retention_rows(self) -> list[RetentionRow]:
        """Return the retention data of all of raylaunch's jobs. Slow: do not call it on the event loop."""
        with database.open_read_only(self.store / _DB) as connection:
            return retention_rows(connection)

    def unfinished(self) -> list[str]:
        """Return the ids of raylaunch's jobs that have not ended, including those whose records cannot be read."""
        return unfinished_ids(self._db)

    def active(self) -> Collection[JobRecord]:
        """Return the jobs that may have processes on a node, without their heavy fields."""
        return tuple(self._active.values())

    def update(
        self,
        job_id: str,
        *,
        kind: str = "",
        message: str | None = None,
        change: Change | None = None,
        **fields: object,
    ) -> JobRecord:
        """Update a job: one line in its journal, one transaction, one event.

        Args:
            job_id: the job's id.
            kind: the event's kind; empty for a quiet change without an event.
            message: the new message of the job and the event; None keeps the job's.
            change: what happened; determines the new state, and sets `started_at` at the first start and `ended_at` at
                an end unless `fields` do.
            fields: further fields of `JobRecord`.

        Returns:
            The updated job; without its heavy fields, unless `fields` has one.

        Raises:
            IllegalTransition: `change` is not possible in the job's state.
            NotFoundError: there is no such job.
            StorageError: it cannot be written; nothing has changed.
        """
        old = self.light(job_id) if HEAVY.isdisjoint(fields) else self.by_id(job_id)
        new = old.changed(change, fields if message is None else {"message": message, **fields}, now=time.time())
        return self._write(old, new, kind=kind, note=message or "")

    def record_wait_reasons(self, waits: Sequence[WaitDecision]) -> None:
        """Record the wait reasons of queued jobs, each with an event.

        One transaction for all, without flushing: wait reasons lost in a crash are determined again.

        Raises:
            StorageError: it cannot be written; nothing has changed.
        """
        written: list[tuple[JobRecord, Event, int]] = []
        sizes: list[tuple[Path, int]] = []
        now = time.time()
        try:
            for seq, wait in enumerate(waits, self._seq + 1):
                new = self.light(wait.job).changed(None, {"reason": wait.reason, "message": wait.message}, now=now)
                new = new.model_copy(update={"cursor": seq})
                event = Event(seq=seq, at=now, job=new.id, kind="waiting", message=wait.message, state=new.state)
                path = self.folder(new.id) / JOURNAL
                before, after = journal.append(path, journal_line(new, event=event), durable=False)
                sizes.append((path, before))
                written.append((new, event, after))
            with self._storing(), database.transaction(self._db):
                for record, event, after in written:
                    database.put_job(self._db, record, journal_bytes=after, heavy=False)
                    database.put_event(self._db, event)
        except BaseException:
            for path, before in sizes:
                journal.cut(path, before)
            raise
        self._seq += len(written)
        for record, _, _ in written:
            self._track(record)
            self._notify(record.id)

    def foreign(self, submission: str) -> JobRecord | None:
        """Return the record of an external job, or None.

        Raises:
            ConflictError: a job of raylaunch's has that id.
        """
        query = "SELECT light, heavy, is_foreign FROM jobs WHERE id = ?"
        light, heavy, is_foreign = self._db.execute(query, (submission,)).fetchone() or ("", "", True)
        if not is_foreign:
            msg = f"{submission} is the id of a raylaunch job"
            raise ConflictError(msg, hint="submit with another --submission-id")
        try:
            return record_from(light, heavy) if light else None
        except StorageError:  # it is rewritten from Ray's report
            return None

    def foreign_unfinished(self) -> list[JobRecord]:
        """Return the external jobs that have not ended, without heavy fields."""
        return list(self._foreign.values())

    def put_foreign(self, view: JobView, *, stop_wish: StopWishModel | None = None) -> JobRecord:
        """Write an external job, with an event if its state has changed. A stop request remains until its end.

        Raises:
            ConflictError: a job of raylaunch's has that id.
            StorageError: it cannot be written.
        """
        old = self.foreign(view.id)
        values: dict[str, object] = {name: getattr(view, name) for name in JobView.model_fields}
        wish = stop_wish or (old.stop_wish if old else None)
        kept = {"foreign": True, "cursor": old.cursor if old else 0, "stop_wish": wish}
        new = JobRecord.model_validate({**values, **kept})
        if old is not None and old.model_copy(update={"updated_at": new.updated_at}) == new:
            return old
        if old is not None and old.state is new.state:
            with self._storing(), database.transaction(self._db):
                database.put_job(self._db, new, journal_bytes=0)
        else:
            event = self._event(new, "foreign", new.message or f"submitted with Ray's own tools, {new.state.value}")
            new = new.model_copy(update={"cursor": event.seq})
            self._commit(event, self.store / JOURNAL, journal.line_of(event), record=new)
        if new.state.ended:
            self._foreign.pop(new.id, None)
        else:
            self._foreign[new.id] = new.light()
        self._notify(new.id)
        return new

    def events(self, *, after: int, job: str = "", limit: int = 500) -> EventPage:
        """Return events after a cursor, oldest first; of one job (its id) or of all."""
        where, values = ("AND job = ?", [after, job]) if job else ("", [after])
        query = f"SELECT * FROM events WHERE seq > ? {where} ORDER BY seq LIMIT ?"  # noqa: S608 -- constants and placeholders
        rows = self._db.execute(query, [*values, limit])
        events = tuple(database.event_from(row) for row in rows)
        return EventPage(events=events, cursor=events[-1].seq if events else after)

    @contextmanager
    def subscribe(self, job: str = "") -> Iterator[asyncio.Event]:
        """Yield an event that is set after each write of a job (its id), or of any; clear it before reading."""
        changed = asyncio.Event()
        waiting = self._changed.setdefault(job, set())
        waiting.add(changed)
        try:
            yield changed
        finally:
            waiting.discard(changed)
            if not waiting and self._changed.get(job) is waiting:
                del self._changed[job]

    def delete(self, job_id: str) -> None:
        """Delete an ended job. Its folder is moved to the trash, which `recovery.empty_trash` deletes.

        Raises:
            ConflictError: the job has not ended.
            NotFoundError: there is no such job.
            StorageError: it cannot be written; the job still exists.
        """
        record = self.by_id(job_id)
        record.require_ended()
        event = self._event(record, "removed", f"{record.name} was removed")
        self._commit(event, self.store / JOURNAL, journal.line_of(event), record=None)
        if not record.foreign:  # external jobs have no folder, and ids from elsewhere
            move_to_trash(self.store, job_id)
        self._notify(job_id)

    def close(self) -> None:
        """Close the database and unlock the store."""
        self._db.close()
        os.close(self._lock)

    def _of_request(self, owner: str, request: SubmitRequest) -> JobRecord | None:
        if not request.request_id:
            return None
        row = self._db.execute(
            "SELECT light, heavy FROM jobs WHERE owner = ? AND request_id = ?", (owner, request.request_id)
        ).fetchone()
        if row is None:
            return None
        earlier = record_from(*row)
        if earlier.spec == request.spec and earlier.package == request.package:
            return earlier
        what = "another spec" if earlier.spec != request.spec else "other code"
        msg = f"request id {request.request_id!r} was already used for {earlier.id}, with {what}"
        raise ConflictError(msg, hint="use a new request id for a new job")

    def _write(self, old: JobRecord | None, new: JobRecord, *, kind: str, note: str) -> JobRecord:
        event = self._event(new, kind, note) if kind else None
        if event is not None:
            new = new.model_copy(update={"cursor": event.seq})
        heavy = old is None or any(getattr(old, name) != getattr(new, name) for name in HEAVY)
        line = journal_line(new, event=event, seq=self._seq, note=note, heavy=heavy)
        self._commit(event, self.folder(new.id) / JOURNAL, line, record=new, heavy=heavy)
        if heavy and new.environment is not None and new.environment.packages:
            journal.write_packages(self.folder(new.id), new.environment.packages)
        self._track(new)
        self._notify(new.id)
        return new

    def _track(self, record: JobRecord) -> None:
        """Keep active and queued jobs in memory."""
        if record.state.active:
            self._active[record.id] = record.light()
        else:
            self._active.pop(record.id, None)
        if record.state is JobState.QUEUED:
            self.backlog.put(request_of(record), recorded=record.reason)
        else:
            self.backlog.drop(record.id)

    def _event(self, record: JobRecord, kind: str, message: str) -> Event:
        at = record.updated_at if kind != "removed" else time.time()
        return Event(seq=self._seq + 1, at=at, job=record.id, kind=kind, message=message, state=record.state)

    def _commit(
        self, event: Event | None, path: Path, line: JournalLine, *, record: JobRecord | None, heavy: bool = True
    ) -> None:
        """Write the journal, then the database; if the database fails, remove the line."""
        before, after = journal.append(path, line)
        try:
            with self._storing(), database.transaction(self._db):
                if record is not None:
                    database.put_job(self._db, record, journal_bytes=0 if record.foreign else after, heavy=heavy)
                else:
                    database.drop_job(self._db, line.job)
                if event is not None:
                    database.put_event(self._db, event)
        except BaseException:
            journal.cut(path, before)
            raise
        if event is not None:
            self._seq = event.seq

    @contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise database.storage_problem(self.store / _DB, error) from error

    def _notify(self, job: str) -> None:
        for name in {"", job}:
            for changed in self._changed.get(name, ()):
                changed.set()


def _no_job(job_id: str) -> NotFoundError:
    return NotFoundError(f"no such job: {job_id!r}", hint="list jobs: raylaunch list")
