"""Opening a store: what crashes, damage and full disks left is repaired, and said."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.disks import fill, small_disk
from support.store import end, kinds, opened, submit

from raylaunch.controller.store.jobs import Records
from raylaunch.errors import ConflictError, StorageError, VersionError
from raylaunch.models.states import Change, JobState


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with opened(tmp_path / "store") as found:
        yield found


# -- opening ---------------------------------------------------------------------------------------------------------


def test_a_second_controller_is_refused_with_the_first_ones_pid(records: Records) -> None:
    with pytest.raises(ConflictError) as raised:
        Records(records.store)
    assert str(raised.value) == (
        f"the store {records.store} is in use by the controller with pid {os.getpid()}\n"
        "  → only one controller at a time can use a store; stop that one, or use another store"
    )


def _damage_with_garbage(db: Path) -> str:
    db.write_bytes(b"this was a database once " * 400)
    return "file is not a database"


def _damage_by_truncation(db: Path) -> str:
    db.write_bytes(db.read_bytes()[: db.stat().st_size // 2])
    return "database disk image is malformed"


@pytest.mark.parametrize("damage", [_damage_with_garbage, _damage_by_truncation])
def test_a_damaged_database_is_kept_aside_and_rebuilt_from_the_journals(tmp_path: Path, damage: object) -> None:
    with opened(tmp_path) as records:
        waiting = submit(records, "waiting", tags=["t"])
        ended = end(records, submit(records, "ended"))
        ended = records.update(ended.id, log_tail=("last words",))
        events = records.events(after=0)
    assert callable(damage)
    why = damage(tmp_path / "raylaunch.db")
    with opened(tmp_path) as records:
        (aside,) = [path.name for path in tmp_path.glob("raylaunch.db.corrupt-*")]
        assert records.repairs == (
            f"The database was damaged ({why}; it was renamed to {aside}) and was rebuilt from the journals of 2 jobs.",
        )
        assert records.get(waiting.id) == waiting
        assert records.get(ended.id) == ended
        assert records.events(after=0) == events
        assert [ask.job for ask in records.backlog] == [waiting.id]
        assert submit(records).cursor == events.cursor + 1
    with opened(tmp_path) as records:
        assert records.repairs == ()


def test_a_database_that_vanished_is_rebuilt_from_the_journals(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        job = submit(records)
    (tmp_path / "raylaunch.db").unlink()
    with opened(tmp_path) as records:
        assert records.repairs == (f"Found in the journals and added: 1 job ({job.id}).",)
        assert records.get(job.id) == job


def test_a_journal_that_is_ahead_of_the_database_is_applied(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        job = submit(records)
    shutil.copy(tmp_path / "raylaunch.db", tmp_path / "before.db")
    with opened(tmp_path) as records:
        ended = end(records, job)
    shutil.move(tmp_path / "before.db", tmp_path / "raylaunch.db")
    with opened(tmp_path) as records:
        assert records.repairs == (f"Brought up to date from the journals: 1 job ({job.id}).",)
        assert records.get(job.id) == ended
        assert kinds(records) == ["submitted", "ended"]
        assert not records.active()


def test_a_submission_of_which_only_half_a_line_reached_the_disk_is_no_job(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        job = submit(records)
        journal = records.folder(job.id) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    (tmp_path / "raylaunch.db").unlink()
    with opened(tmp_path) as records:
        assert records.page().total == 0


def test_a_damaged_line_in_a_journal_is_reported_and_the_rest_is_used(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        job = submit(records)
        with (records.folder(job.id) / "journal.jsonl").open("ab") as journal:
            journal.write(b"\xff\xfe\n")
    with opened(tmp_path) as records:
        assert records.repairs == (f"Journals with damaged lines, which were skipped: {job.id}.",)
        assert records.get(job.id) == job


def test_a_store_of_a_newer_raylaunch_is_refused_and_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    with sqlite3.connect(tmp_path / "raylaunch.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(VersionError) as raised:
        Records(tmp_path)
    assert str(raised.value) == (
        f"the database {tmp_path}/raylaunch.db was written by a newer raylaunch (schema 99, this one knows 1)\n"
        "  → upgrade raylaunch here, or give this cluster another store"
    )


def test_a_full_disk_is_reported_and_nothing_incomplete_counts_as_done(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=1024) as disk, opened(disk) as records:
        job = submit(records)
        ballast = fill(disk)
        with pytest.raises(StorageError) as raised:
            records.update(job.id, kind="ended", change=Change.FAIL, log_tail=("x" * 2000,) * 50)
        assert raised.value.message.endswith("No space left on device")
        with pytest.raises(StorageError):
            submit(records, "second")
        assert records.get(job.id) == job
        assert [listed.id for listed in records.page().jobs] == [job.id]
        ballast.unlink()
        assert end(records, job).state is JobState.FAILED
        assert kinds(records) == ["submitted", "ended"]


def test_a_removal_that_a_crash_cut_short_is_finished_at_the_next_open(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        job = end(records, submit(records))
        shutil.copytree(records.folder(job.id), tmp_path / "copy")
        shutil.copy(tmp_path / "raylaunch.db", tmp_path / "before.db")
        shutil.copy(tmp_path / "raylaunch.db-wal", tmp_path / "before.db-wal")
        records.delete(job.id)
    shutil.move(tmp_path / "copy", tmp_path / "jobs" / job.id)
    shutil.move(tmp_path / "before.db", tmp_path / "raylaunch.db")
    shutil.move(tmp_path / "before.db-wal", tmp_path / "raylaunch.db-wal")
    with opened(tmp_path) as records:
        assert records.page().total == 0
        assert not records.folder(job.id).exists()


def test_a_sequence_number_is_never_given_twice(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        job = end(records, submit(records))
        records.delete(job.id)
        before = records.cursor
    (tmp_path / "raylaunch.db").write_bytes(b"garbage")
    with opened(tmp_path) as records:
        assert records.cursor == before
        assert submit(records).cursor == before + 1


def test_a_locked_database_is_reported_and_the_journal_is_restored(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        job = submit(records)
        with contextlib.closing(sqlite3.connect(tmp_path / "raylaunch.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StorageError) as raised:
                end(records, job)
        assert raised.value.message == f"cannot use the database {tmp_path}/raylaunch.db: database is locked"
        assert records.get(job.id) == job
        ended = end(records, job)
        assert ended.cursor == job.cursor + 1
    with opened(tmp_path) as records:
        assert records.repairs == ()
        assert kinds(records) == ["submitted", "ended"]
