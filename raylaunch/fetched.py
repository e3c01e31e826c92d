"""Which files of a folder `raylaunch get` wrote: those are a job's results, and are not sent back with the next one.

``.raylaunch/fetched.json`` in the folder that they were downloaded into names the job, and each file with its size and
time. A file that was changed since is the person's own again: it is sent, and no later download replaces it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from raylaunch.directory import Directory

FETCHED = "built in: files that raylaunch get wrote"
"""The rule that leaves them out."""
_FOLDER = ".raylaunch"
_FILE = "fetched.json"
_LARGEST = 16 * 1024 * 1024


class Stamp(NamedTuple):
    """A file as it was when it had been written."""

    bytes: int
    mtime_ns: int

    def is_still(self, entry: os.DirEntry[str]) -> bool:
        """Return whether nobody has changed the file since."""
        seen = entry.stat(follow_symlinks=False)
        return (seen.st_size, seen.st_mtime_ns) == self


def fetched_in(folder: Path) -> Mapping[str, Stamp]:
    """Return the files below `folder` that were downloaded into it, by their relative names."""
    return {name: stamp for files in _read(folder).values() for name, stamp in files.items()}


class FetchedFiles:
    """What was downloaded into one folder, by job; saved with `save`.

    Args:
        folder: the folder, open.
    """

    def __init__(self, folder: Directory) -> None:
        self._folder = folder
        self._jobs = {job: dict(files) for job, files in _read(folder.path).items()}
        self._changed = False

    def of_others(self, job: str) -> tuple[str, ...]:
        """Return the other jobs whose files are still here, as they were downloaded or changed."""
        return tuple(one for one, files in self._jobs.items() if one != job and any(map(self._is_here, files)))

    def _is_here(self, name: str) -> bool:
        return os.path.lexists(self._folder.path / name)

    def is_unchanged(self, job: str, name: str, here: os.stat_result) -> bool:
        """Return whether a file is just what an earlier download of this job left under that name."""
        return self._jobs.get(job, {}).get(name) == Stamp(here.st_size, here.st_mtime_ns)

    def add(self, job: str, name: str, here: os.stat_result) -> None:
        """Note that a file of `job` was downloaded just now."""
        for files in self._jobs.values():
            files.pop(name, None)
        self._jobs.setdefault(job, {})[name] = Stamp(here.st_size, here.st_mtime_ns)
        self._changed = True

    def save(self) -> None:
        """Write what was noted.

        Raises:
            OSError: it cannot be written, or a link is in its place.
        """
        if not self._changed:
            return
        part = f".{_FILE}.{os.getpid()}"
        text = json.dumps({"jobs": {job: files for job, files in self._jobs.items() if files}})
        with self._folder.child(_FOLDER, make=True) as home:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with os.fdopen(home.open_file(part, flags, 0o600), "w", encoding="utf-8") as index:
                index.write(text)
            home.replace(part, _FILE)
        self._changed = False


def _read(folder: Path) -> dict[str, dict[str, Stamp]]:
    try:
        with (folder / _FOLDER / _FILE).open("rb") as file:
            jobs = json.loads(file.read(_LARGEST))["jobs"]
        return {
            str(job): {str(name): Stamp(int(size), int(at)) for name, (size, at) in files.items()}
            for job, files in jobs.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
