"""Keeping a log that a running program appends to from filling the disk.

Controller and cluster both do so, and do not know each other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

MOST_BYTES = 16 * 1024 * 1024


def rotate(path: Path, *, most_bytes: int = MOST_BYTES) -> bool:
    """Move what a log holds into ``<name>.1`` if it has become large; return whether that was done.

    Its writers keep their descriptors, which must append (O_APPEND): the file stays the same one and becomes empty. A
    line that is written in that moment may be lost.
    """
    try:
        if path.stat().st_size <= most_bytes:
            return False
        kept = path.with_name(f"{path.name}.1")
        with contextlib.suppress(OSError):  # a full disk: then the room is worth more than the lines
            shutil.copyfile(path, kept)
            kept.chmod(0o600)
        os.truncate(path, 0)
    except OSError:  # there is no log, or it is not ours to change
        return False
    return True
