"""The controller's SQLite database: opening and migrating it, its rows, and the queries over jobs.

A table of jobs, whose heavy fields have their own column so that lists never read them; and a table of events.
Everything in it can be rebuilt from the journals, so ``synchronous = NORMAL`` is enough.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from raylaunch.controller.store.record import JobRecord, heavy_json, light_json, record_from
from raylaunch.errors import SpecError, StorageError, VersionError
from raylaunch.models.job import Event, JobPage, JobView
from raylaunch.models.states import JobState

_log = logging.getLogger(__name__)

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        owner TEXT NOT NULL,
        state TEXT NOT NULL,
        is_foreign INTEGER NOT NULL,
        created_at REAL NOT NULL,
        request_id TEXT NOT NULL,
        tags TEXT NOT NULL,
        journal_bytes INTEGER NOT NULL,
        light TEXT NOT NULL,
        heavy TEXT NOT NULL
    );
    CREATE INDEX jobs_by_age ON jobs (created_at DESC, id DESC);
    CREATE INDEX jobs_by_name ON jobs (name, created_at DESC);
    CREATE INDEX jobs_by_owner ON jobs (owner, created_at DESC);
    CREATE INDEX jobs_by_state ON jobs (state, created_at DESC);
    CREATE UNIQUE INDEX jobs_by_request ON jobs (owner, request_id) WHERE request_id != '';
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        job TEXT NOT NULL,
        kind TEXT NOT NULL,
        message TEXT NOT NULL,
        state TEXT
    );
    CREATE INDEX events_by_job ON events (job, seq);
    """,
)
"""Each migrates the database by one version; ``PRAGMA user_version`` is the number of those applied."""


LISTED = "jobs_listed"
_LISTED = f"""
    CREATE INDEX IF NOT EXISTS {LISTED} ON jobs (created_at DESC, id DESC, state, name, owner, tags)
"""
"""Covers all filters of a list, so that only rows of jobs on the page are read. Older raylaunch versions work with it
too, so it needs no new schema version."""

_BUSY_S = 2.0
"""How long a write waits for a person who has locked the database with sqlite3."""
METRICS_LISTED = 20
"""How many metrics of a job a list contains; the job itself may have more."""


def open_database(path: Path) -> tuple[sqlite3.Connection, str]:
    """Open the database and migrate it; a damaged one is renamed and replaced by a new one.

    Returns:
        The connection, and what was wrong with a damaged database (empty if none was).

    Raises:
        VersionError: a newer raylaunch wrote it.
        StorageError: it cannot be opened, for another reason than damage.
    """
    try:
        return _open_checked(path), ""
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise storage_problem(path, error) from error
        aside = _rename_damaged(path)
        try:
            return _open_checked(path), f"{error}; it was renamed to {aside.name}"
        except sqlite3.DatabaseError as again:
            raise storage_problem(path, again) from again


@contextmanager
def open_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """Open another connection, for queries whose results grow with the number of jobs; in any thread.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise storage_problem(path, error) from error


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the database itself is broken, rather than its disk full, locked or unreadable."""
    if isinstance(error, sqlite3.OperationalError):
        return any(words in str(error) for words in ("malformed", "no such table"))
    return isinstance(error, sqlite3.DatabaseError)


def storage_problem(path: Path, error: sqlite3.Error) -> StorageError:
    """Return SQLite's error as a `StorageError`."""
    hint = "nothing was recorded; check free space and permissions on that disk, then try again"
    return StorageError(f"cannot use the database {path}: {error}", hint=hint)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the block in a transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def put_job(connection: sqlite3.Connection, record: JobRecord, *, journal_bytes: int, heavy: bool = True) -> None:
    """Write the row of a job.

    Args:
        connection: the database.
        record: the job; without `heavy`, its heavy fields are ignored.
        journal_bytes: the size of its journal to which the row corresponds.
        heavy: whether its heavy fields are written too; otherwise the row must exist.
    """
    light = json.dumps(light_json(record), ensure_ascii=False)
    if not heavy:
        connection.execute(
            "UPDATE jobs SET state = ?, journal_bytes = ?, light = ? WHERE id = ?",
            (record.state.value, journal_bytes, light, record.id),
        )
        return
    tags = "".join(f"\n{tag}" for tag in record.spec.tags) + "\n" if record.spec else ""
    connection.execute(
        "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.id,
            record.name,
            record.owner,
            record.state.value,
            record.foreign,
            record.created_at,
            record.request_id,
            tags,
            journal_bytes,
            light,
            json.dumps(heavy_json(record), ensure_ascii=False),
        ),
    )


def put_event(connection: sqlite3.Connection, event: Event) -> None:
    """Write an event, unless it exists."""
    connection.execute(
        "INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, ?)",
        (event.seq, event.at, event.job, event.kind, event.message, event.state.value if event.state else None),
    )


def drop_job(connection: sqlite3.Connection, job: str) -> None:
    """Delete the row of a job and its events."""
    connection.execute("DELETE FROM jobs WHERE id = ?", (job,))
    connection.execute("DELETE FROM events WHERE job = ?", (job,))


def event_from(row: tuple[int, float, str, str, str, str | None]) -> Event:
    """Return the event in a row."""
    seq, at, job, kind, message, state = row
    return Event(seq=seq, at=at, job=job, kind=kind, message=message, state=JobState(state) if state else None)


def _open_checked(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        _check(connection)
        _migrate(connection, path)
        connection.execute(_LISTED)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection) -> None:
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(found)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        msg = (
            f"the database {path} was written by a newer raylaunch (schema {version}, this one knows {len(MIGRATIONS)})"
        )
        raise VersionError(msg, hint="upgrade raylaunch here, or give this cluster another store")
    for number in range(version, len(MIGRATIONS)):
        connection.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")


def _rename_damaged(path: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    aside = path.with_name(f"{path.name}.corrupt-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.corrupt-{stamp}-{number}")
    for ending in ("-wal", "-shm"):
        extra = path.with_name(path.name + ending)
        if extra.exists():
            extra.rename(aside.with_name(aside.name + ending))
    path.rename(aside)
    return aside


class Filters(NamedTuple):
    """Filters of a list of jobs. Empty ones match all."""

    states: tuple[JobState, ...] = ()
    name: str = ""
    """``*`` matches anything."""
    owner: str = ""
    tag: str = ""
    since: float | None = None
    """Submitted at or after this time, seconds since the epoch."""

    @property
    def many(self) -> bool:
        """Whether no index of a single column covers them."""
        given = sum(map(bool, (self.states, self.name, self.owner, self.tag, self.since is not None)))
        return given > 1 or bool(self.tag) or "*" in self.name

    def where(self) -> tuple[str, list[str | float]]:
        """Return a condition in SQL, and its parameters."""
        conditions: list[str] = []
        values: list[str | float] = []
        if self.states:
            conditions.append(f"state IN ({', '.join('?' * len(self.states))})")
            values.extend(state.value for state in self.states)
        if self.name:
            conditions.append("name GLOB ?" if "*" in self.name else "name = ?")
            values.append(self.name)
        if self.owner:
            conditions.append("owner = ?")
            values.append(self.owner)
        if self.tag:
            conditions.append("instr(tags, ?) > 0")
            values.append(f"\n{self.tag}\n")
        if self.since is not None:
            conditions.append("created_at >= ?")
            values.append(self.since)
        return " AND ".join(conditions) or "1", values


def page_of(
    connection: sqlite3.Connection, filters: Filters, known: Mapping[str, JobRecord], *, limit: int, cursor: str
) -> JobPage:
    """Return one page of jobs, newest first, without heavy fields. Jobs in `known` are not read again.

    Raises:
        SpecError: the cursor is invalid.
    """
    where, values = filters.where()
    jobs_ = f"jobs INDEXED BY {LISTED}" if filters.many else "jobs"
    count = f"SELECT count(*) FROM {jobs_} WHERE {where}"  # noqa: S608 -- only columns and placeholders; values are parameters
    total = connection.execute(count, values).fetchone()[0]
    if cursor:
        where = f"{where} AND (created_at, id) < (?, ?)"
        values = [*values, *_read_cursor(cursor)]
    query = f"SELECT created_at, id FROM {jobs_} WHERE {where} ORDER BY created_at DESC, id DESC LIMIT ?"  # noqa: S608 -- same reason
    rows = connection.execute(query, [*values, limit + 1]).fetchall()
    more = len(rows) > limit
    shown = rows[:limit]
    lights = _lights(connection, [job for _, job in shown if job not in known])
    jobs, unreadable = [], []
    for _, job in shown:
        try:
            jobs.append(_listed(known.get(job) or record_from(lights[job])))
        except StorageError as error:  # noqa: PERF203 -- each is one row
            _log.warning("skipping %s in a list: %s", job, error.message)
            unreadable.append(job)
    return JobPage(
        jobs=tuple(jobs),
        next_cursor=f"{shown[-1][0]!r}~{shown[-1][1]}" if more and shown else "",
        total=total,
        unreadable=tuple(unreadable),
    )


def _lights(connection: sqlite3.Connection, jobs: Sequence[str]) -> dict[str, str]:
    placeholders = ", ".join("?" * len(jobs))
    return dict(connection.execute(f"SELECT id, light FROM jobs WHERE id IN ({placeholders})", jobs))  # noqa: S608 -- only placeholders


def _listed(record: JobRecord) -> JobView:
    """Return a job as lists show it, with a limited number of metrics."""
    view = record.view()
    if len(view.last_metrics) <= METRICS_LISTED:
        return view
    return view.model_copy(update={"last_metrics": dict(islice(view.last_metrics.items(), METRICS_LISTED))})


def unfinished(connection: sqlite3.Connection, *, foreign: bool) -> tuple[list[JobRecord], list[str]]:
    """Return the jobs that have not ended, without heavy fields; and a message for each that cannot be read."""
    where, values = _unfinished_condition(foreign=foreign)
    rows = connection.execute(f"SELECT id, light FROM jobs WHERE {where}", values)  # noqa: S608 -- only placeholders
    found, unreadable = [], []
    for job, light in rows:
        try:
            found.append(record_from(light))
        except StorageError as error:  # noqa: PERF203 -- each is one row
            unreadable.append(f"{job} was skipped: {error.message}")
    return found, unreadable


def unfinished_ids(connection: sqlite3.Connection) -> list[str]:
    """Return the ids of raylaunch's jobs that have not ended."""
    where, values = _unfinished_condition(foreign=False)
    return [job for (job,) in connection.execute(f"SELECT id FROM jobs WHERE {where}", values)]  # noqa: S608 -- only placeholders


def _unfinished_condition(*, foreign: bool) -> tuple[str, list[str | bool]]:
    unfinished_states = [state.value for state in JobState if not state.ended]
    return f"state IN ({', '.join('?' * len(unfinished_states))}) AND is_foreign = ?", [*unfinished_states, foreign]


def nearest(ref: str, known: Sequence[str]) -> list[str]:
    """Return up to three of `known` that resemble `ref`, most similar first. Takes 50 ms for a thousand."""
    return difflib.get_close_matches(ref, known, n=3, cutoff=0.6)


def _read_cursor(cursor: str) -> tuple[float, str]:
    created_at, _, job = cursor.partition("~")
    try:
        return float(created_at), job
    except ValueError:
        msg = f"{cursor!r} is not a valid cursor"
        raise SpecError(msg, hint="pass next_cursor of the previous page, or leave it out for the first page") from None


class RetentionRow(NamedTuple):
    """What retention needs to know of a job: when it ended (None if it has not), its code package and its wheels."""

    id: str
    ended_at: float | None
    package: str
    wheels: tuple[str, ...] = ()

    @property
    def packages(self) -> tuple[str, ...]:
        """All packages that the job needs."""
        return (self.package, *self.wheels)


def retention_rows(db: sqlite3.Connection) -> list[RetentionRow]:
    """Return the rows of all of raylaunch's jobs."""
    found = db.execute(
        "SELECT id, state, json_extract(light, '$.ended_at'), json_extract(light, '$.package'), "
        "json_extract(heavy, '$.wheels') FROM jobs WHERE NOT is_foreign AND json_valid(light)"
    ).fetchall()
    others = "json_extract(heavy, '$.wheels') FROM jobs WHERE NOT is_foreign AND NOT json_valid(light)"
    for job, state, text, wheels in db.execute(f"SELECT id, state, light, {others}"):
        light = json.loads(text)  # NaN is valid JSON for Python only
        found.append((job, state, light.get("ended_at"), light.get("package"), wheels))
    return [
        RetentionRow(job, at if JobState(state).ended else None, package or "", _shas(wheels))
        for job, state, at, package, wheels in found
    ]


def _shas(sets: str | None) -> tuple[str, ...]:
    return tuple(wheel["sha256"] for one in json.loads(sets or "[]") for wheel in one["wheels"])
