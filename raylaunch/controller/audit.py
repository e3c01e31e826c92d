"""The audit log: who changed what, one JSON line each, in ``audit.jsonl`` of the store. Never a secret's value."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from pathlib import Path

from raylaunch.log_rotation import MOST_BYTES

_log = logging.getLogger(__name__)

_KEPT = 20
"""How many older files stay."""


class AuditLog:
    """Appends lines ``{"at", "person", "verb", "job", "ok", "status"}``."""

    def __init__(self, store: Path, *, most_bytes: int = MOST_BYTES) -> None:
        self._path = store / "audit.jsonl"
        self._most_bytes = most_bytes

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
            self._rotate()
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, json.dumps(line, ensure_ascii=False).encode() + b"\n")
            finally:
                os.close(fd)
        except OSError:
            _log.exception("not in the audit log: %s", line)

    def _rotate(self) -> None:
        """Begin another file when this one has become large; older ones are ``audit.1.jsonl`` and so on."""
        if not self._path.exists() or self._path.stat().st_size < self._most_bytes:
            return
        older = [self._path, *(self._path.with_name(f"audit.{n}.jsonl") for n in range(1, _KEPT + 1))]
        for path, after in reversed(list(itertools.pairwise(older))):
            if path.exists():
                path.replace(after)
