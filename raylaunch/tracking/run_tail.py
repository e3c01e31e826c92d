"""The last values of a run whose file is too large to be read whole for them: from its end."""

from __future__ import annotations

from pathlib import Path

from raylaunch.errors import TrackingError
from raylaunch.tracking.frames import BLOCK
from raylaunch.tracking.run_file import History, RunFile, Summary


def last_values(path: Path, *, most: int) -> dict[str, float]:
    """Return the last value of each metric that the end of the file has, numbers of the summary among them.

    Args:
        path: the run's ``.wandb`` file.
        most: how many bytes to read, to a block more.

    Raises:
        TrackingError: the file is not W&B's, or cannot be read.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise TrackingError(msg) from error
    drawn: dict[str, float] = {}
    told: dict[str, float] = {}
    for item in RunFile(path, start=max(0, size - most) // BLOCK * BLOCK).stream():
        if isinstance(item, History):
            drawn.update(item.values)
        elif isinstance(item, Summary):
            told.update(item.values)
    return {**told, **drawn}
