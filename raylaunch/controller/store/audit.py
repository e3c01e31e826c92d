"""Which hosts are drained: ``drains.json`` in the store. A drained host gets no new attempts."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from raylaunch.controller.store.secrets import write_private
from raylaunch.errors import ConflictError, NotFoundError
from raylaunch.files import MOST_BYTES
from raylaunch.models.cluster import Drain

_log = logging.getLogger(__name__)

_DRAINS: TypeAdapter[dict[str, Drain]] = TypeAdapter(dict[str, Drain])


class DrainStore:
    """The drains of one store, by host. One whose time has come is over by itself.

    Args:
        store: the store's folder.
        clock: the time now, seconds since the epoch.
    """

    def __init__(self, store: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = store / "drains.json"
        self._clock = clock
        self.problem = ""
        """Why the file could not be read at the start, in words; nothing is drained then."""
        self._known = self._read()

    def now(self) -> Mapping[str, Drain]:
        """Return the drains that hold now."""
        at = self._clock()
        return {host: drain for host, drain in self._known.items() if drain.until is None or drain.until > at}

    def put(self, drain: Drain) -> None:
        """Drain a host; a later drain of it replaces the earlier.

        Raises:
            StorageError: it cannot be written; all is as it was.
        """
        self._write({**self.now(), drain.host: drain})

    def remove(self, host: str) -> None:
        """Let a host take jobs again.

        Raises:
            NotFoundError: it is not drained.
            StorageError: it cannot be written; all is as it was.
        """
        now = self.now()
        if host not in now:
            msg = f"{host} is not drained"
            raise NotFoundError(msg, hint="see which hosts are: raylaunch status")
        self._write({name: drain for name, drain in now.items() if name != host})

    def _read(self) -> dict[str, Drain]:
        try:
            return _DRAINS.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            self.problem = f"{self._path} cannot be read ({type(error).__name__}), so no host counts as drained"
            _log.warning("%s", self.problem)
            return {}

    def _write(self, drains: Mapping[str, Drain]) -> None:
        text = json.dumps({host: drain.model_dump(mode="json") for host, drain in drains.items()}, indent=2)
        write_private(self._path, text)
        self._known, self.problem = dict(drains), ""


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


def lock_store(store: Path) -> int:
    """Lock the store and write this process's pid beside. The lock ends with the returned descriptor, or the process.

    Raises:
        ConflictError: another controller holds it.
        OSError: the lock file cannot be written.
    """
    fd = os.open(store / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        msg = f"the store {store} is in use by the controller with pid {holder}"
        hint = "one controller at a time can use a store; end that one, or use another store"
        raise ConflictError(msg, hint=hint) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
