"""Did the training fail because ``wandb.init`` broke on-line, before it had measured anything?"""

from __future__ import annotations

import re
from pathlib import Path

from raylaunch.runner import contract

_HISTORY = 2
"""Number of the field `history` in wandb.proto's Record."""
_BROKEN_INIT = re.compile(
    rb"wandb\.errors\.\S*(?:CommError|UsageError|AuthenticationError|WandbInitError)"
    rb"|^(?:\w+\.)*(?:CommError|AuthenticationError|UsageError): ",
    re.MULTILINE,
)


def init_broke(folder: Path, log_tail: bytes) -> bool:
    """Return whether the log ends in W&B's own error, and no point of history has been written."""
    if not _BROKEN_INIT.search(log_tail):
        return False
    runs = (folder / contract.WANDB).glob("wandb/*run-*/run-*.wandb")
    return not any(has_history(path) for path in runs)


def has_history(path: Path) -> bool:
    """Return whether a .wandb file holds a row of history. One that cannot be read holds none."""
    # Only for a training that failed at wandb.init; each start would pay for these imports.
    from raylaunch.errors import TrackingError  # noqa: PLC0415
    from raylaunch.tracking.frames import Frames  # noqa: PLC0415
    from raylaunch.tracking.wire import WireError, fields  # noqa: PLC0415

    try:
        return any(number == _HISTORY for record in Frames(path).read() for number, _ in fields(record))
    except (TrackingError, WireError):
        return False
