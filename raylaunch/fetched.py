"""Which files of a folder `raylaunch get` wrote: those are a job's results, and are not sent back with the next one.

``.raylaunch/fetched.json`` in the folder that they were downloaded into names the job, and each file with its size and
time. A file that was changed since is the person's own again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

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


def jobs_fetched_into(folder: Path) -> frozenset[str]:
    """Return the ids of the jobs whose files were downloaded into `folder`."""
    return frozenset(_read(folder))


def note_fetched(folder: Path, job: str, files: Iterable[Path]) -> None:
    """Note that these files below `folder` were downloaded just now, and are those of `job`.

    Raises:
        OSError: it cannot be written.
    """
    noted = dict(_read(folder))
    mine = dict(noted.get(job, {}))
    for file in files:
        seen = file.lstat()
        mine[file.relative_to(folder).as_posix()] = Stamp(seen.st_size, seen.st_mtime_ns)
    home = folder / _FOLDER
    home.mkdir(mode=0o700, exist_ok=True)
    beside = home / f".{_FILE}.{os.getpid()}"
    text = json.dumps({"jobs": {**noted, job: mine}})
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as index:
        index.write(text)
    beside.replace(home / _FILE)


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
