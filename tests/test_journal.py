"""The journal: a line is either wholly on the disk, or it never was."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.disks import fill, small_disk

from raylaunch.controller.store import journal
from raylaunch.controller.store.journal import JournalLine
from raylaunch.errors import StorageError


def _line(seq: int, message: str = "") -> JournalLine:
    return JournalLine(seq=seq, at=1.0, kind="said", message=message)


def _seqs(path: Path) -> list[int | None]:
    return [line.seq if line else None for line in journal.read(path)]


def test_lines_come_back_in_order_with_the_sizes_before_and_after(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert journal.append(path, _line(1)) == (0, path.stat().st_size)
    before = path.stat().st_size
    assert journal.append(path, _line(2, "größer")) == (before, path.stat().st_size)
    assert _seqs(path) == [1, 2]


def test_a_last_line_without_its_end_is_ignored_and_cut_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal.append(path, _line(1))
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(_line(2, "x" * 200_000).encode()[:-1])
    assert _seqs(path) == [1]
    assert journal.append(path, _line(3))[0] == whole
    assert _seqs(path) == [1, 3]


def test_a_damaged_line_in_the_middle_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal.append(path, _line(1))
    with path.open("ab") as file:
        file.write(b"\xff\x00 not json\n")
    journal.append(path, _line(3))
    assert _seqs(path) == [1, None, 3]


def test_a_full_disk_is_reported_and_leaves_the_journal_unchanged(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=256) as disk:
        path = disk / "journal.jsonl"
        journal.append(path, _line(1))
        before = path.read_bytes()
        fill(disk, but_kib=8)
        with pytest.raises(StorageError) as raised:
            journal.append(path, _line(2, "x" * 100_000))
        assert path.read_bytes() == before
    assert raised.value.message == f"cannot write {path}: No space left on device"
    assert raised.value.hint == (
        "nothing was recorded; free space on that disk (raylaunch du shows the usage of jobs), then try again"
    )


def test_the_journal_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal.append(path, _line(1))
    assert path.stat().st_mode & 0o777 == 0o600
