"""A small file of the store that nobody else can read, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from raylaunch.controller.journal import write_problem


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path`, 0600: beside it first, on the disk, then renamed.

    Raises:
        StorageError: it cannot be written; what was there stays.
    """
    beside = path.with_name(f"{path.name}.new")
    try:
        beside.unlink(missing_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise write_problem(path, error) from error
