"""Writing at an offset of a file. Standard library only: a lane needs nothing else to begin."""

from __future__ import annotations

import os
from collections.abc import Sequence

_PIECES = 512
"""So many are written at once; systems take 1,024 at most (IOV_MAX)."""


def write_all(descriptor: int, pieces: Sequence[bytes], at: int) -> None:
    """Write all pieces at an offset, one behind the other, or raise what the system says."""
    left = [memoryview(piece) for piece in pieces]
    while left:  # of a disk that is nearly full some bytes are taken; the next try is refused
        written = os.pwritev(descriptor, left[:_PIECES], at)
        at += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
