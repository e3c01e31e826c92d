"""The database of the controller: its migrations, how it is opened, and its rows.

One table of jobs whose heavy fields lie in a column of their own, so that a list never reads them; and one of events.
Everything in it can be rebuilt from the journals, so ``synchronous = NORMAL`` is enough.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from raylaunch.controller.record import JobRecord, heavy_json, light_json
from raylaunch.errors import StorageError, VersionError
from raylaunch.state import Event, JobState

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
"""Each brings the database one version on; ``PRAGMA user_version`` counts those that were applied."""


LISTED = "jobs_listed"
_LISTED = f"""
    CREATE INDEX IF NOT EXISTS {LISTED} ON jobs (created_at DESC, id DESC, state, name, owner, tags)
"""
"""Has all that a list filters by, so that no row is read of a job that is not on the page. An older raylaunch does not
mind it, so that it counts as no version."""

_BUSY_S = 2.0
"""How long a write waits for a person who holds the database with sqlite3."""


def open_database(path: Path) -> tuple[sqlite3.Connection, str]:
    """Open the database, bring it to this version, and keep a damaged one aside.

    Returns:
        The connection, and what was wrong with the database that was kept aside (empty when nothing was).

    Raises:
        VersionError: a newer raylaunch wrote it.
        StorageError: it cannot be opened for another reason than damage.
    """
    try:
        return _open_sound(path), ""
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise storage_problem(path, error) from error
        aside = _keep_aside(path)
        try:
            return _open_sound(path), f"{error}; it was kept as {aside.name}"
        except sqlite3.DatabaseError as again:
            raise storage_problem(path, again) from again


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database once more, for a question whose answer grows with the number of jobs; in any thread.

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
    """Say what SQLite could not do."""
    hint = "free space on that disk and look at its permissions, then try again; nothing was recorded"
    return StorageError(f"cannot use the database {path}: {error}", hint=hint)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Do all of the block or none of it."""
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
        record: the job; of a row that stays as heavy as it is, its heavy fields are not looked at.
        journal_bytes: the size of its journal that the row stands for.
        heavy: whether its heavy fields are written too; there must be a row when they are not.
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
    """Write an event; one that is there already stays as it is."""
    connection.execute(
        "INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, ?)",
        (event.seq, event.at, event.job, event.kind, event.message, event.state.value if event.state else None),
    )


def drop_job(connection: sqlite3.Connection, job: str) -> None:
    """Delete the row of a job and its events."""
    connection.execute("DELETE FROM jobs WHERE id = ?", (job,))
    connection.execute("DELETE FROM events WHERE job = ?", (job,))


def event_from(row: tuple[int, float, str, str, str, str | None]) -> Event:
    """Build an event from its row."""
    seq, at, job, kind, message, state = row
    return Event(seq=seq, at=at, job=job, kind=kind, message=message, state=JobState(state) if state else None)


def _open_sound(path: Path) -> sqlite3.Connection:
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


def _keep_aside(path: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    aside = path.with_name(f"{path.name}.corrupt-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.corrupt-{stamp}-{number}")
    for ending in ("-wal", "-shm"):
        beside = path.with_name(path.name + ending)
        if beside.exists():
            beside.rename(aside.with_name(aside.name + ending))
    path.rename(aside)
    return aside
