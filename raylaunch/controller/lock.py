"""One controller at a time holds a store."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from raylaunch.errors import ConflictError


def take_lock(store: Path) -> int:
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
