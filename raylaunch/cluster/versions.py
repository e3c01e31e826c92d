"""Whether what runs and what is installed here fit together. Pure."""

from __future__ import annotations

from raylaunch.cluster.look import Seen
from raylaunch.errors import RayVersionError, VersionError
from raylaunch.version import __version__, is_older


def check_versions(seen: Seen, installed: str) -> bool:
    """Return whether the controller that runs is an older one, to be replaced.

    Raises:
        VersionError: another Ray, or a controller newer than this raylaunch, runs.
    """
    record = seen.record
    if record is None or not (seen.ray_alive or seen.controller_alive):
        return False
    if record.versions.ray != installed:
        msg = f"cluster {record.name} runs Ray {record.versions.ray}, and Ray {installed} is installed here"
        hint = "raylaunch up --upgrade: when no job runs any more, it starts the cluster anew with this Ray"
        raise RayVersionError(msg, hint=hint)
    return check_ours(seen)


def check_ours(seen: Seen) -> bool:
    """Return whether the controller that runs is an older one, to be replaced.

    Raises:
        VersionError: it is newer than this raylaunch.
    """
    record = seen.record
    if record is None or not (seen.ray_alive or seen.controller_alive):
        return False
    runs = record.versions.raylaunch
    if is_older(__version__, runs):
        msg = f"cluster {record.name} was started by raylaunch {runs}, and this is {__version__}"
        raise VersionError(msg, hint=f"upgrade this one to {runs}, or raylaunch down, then raylaunch up")
    return seen.controller_alive and runs != __version__
