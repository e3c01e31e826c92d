"""The audit log: who changed what, one JSON line each, in ``audit.jsonl`` of the store. Never a secret's value."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

_log = logging.getLogger(__name__)


class AuditLog:
    """Appends lines ``{"at", "person", "verb", "job", "ok", "status"}``."""

    def __init__(self, store: Path) -> None:
        self._path = store / "audit.jsonl"

    def write(self, *, person: str, verb: str, job: str, status: int) -> None:
        """Append one line. A disk that is full does not undo what was done: the log of the controller then says so."""
        line = {
            "at": time.time(),
            "person": person,
            "verb": verb,
            "job": job,
            "ok": status < 400,  # noqa: PLR2004 -- HTTP: 400 and above are errors
            "status": status,
        }
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, json.dumps(line, ensure_ascii=False).encode() + b"\n")
            finally:
                os.close(fd)
        except OSError:
            _log.exception("not in the audit log: %s", line)
