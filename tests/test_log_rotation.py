"""Logs and the audit log stay small while programs write to them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from raylaunch.controller.store.audit import AuditLog
from raylaunch.files import rotate


def test_a_large_log_is_kept_once_and_its_writer_goes_on_in_the_same_file(tmp_path: Path) -> None:
    log = tmp_path / "controller.log"
    writer = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(writer, b"first\n")
        assert not rotate(log, most_bytes=6)
        os.write(writer, b"second\n")
        assert rotate(log, most_bytes=6)
        os.write(writer, b"third\n")
    finally:
        os.close(writer)
    kept = tmp_path / "controller.log.1"
    assert (kept.read_bytes(), log.read_bytes()) == (b"first\nsecond\n", b"third\n")
    assert kept.stat().st_mode & 0o077 == 0


def test_a_log_that_is_not_there_is_left_alone(tmp_path: Path) -> None:
    assert not rotate(tmp_path / "none.log")


def test_no_line_of_the_audit_log_is_lost_when_another_file_begins(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path, most_bytes=300)
    for number in range(20):
        audit.write(person="ana", verb="submit", job=f"job-{number}", status=200)
    files = [tmp_path / "audit.jsonl", *tmp_path.glob("audit.*.jsonl")]
    lines = [json.loads(line)["job"] for file in files for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(f"job-{number}" for number in range(20))
    assert all(file.stat().st_size < 600 for file in files)
