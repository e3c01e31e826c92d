"""Checks before files leave this machine: files that look like secrets, home folders, very large packages.

The rules are the same in every interface. Only a person allows exceptions: in a command, in Python, or when the MCP
server is started, never in a file of the project and never by a tool's argument.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from raylaunch.errors import SpecError, WithheldError
from raylaunch.files import Directory
from raylaunch.models.fields import size_bytes
from raylaunch.models.job import FileFact

ASKED_ABOVE = 100_000_000
"""Bytes of an upload above which a person at a terminal is asked."""
LARGEST_UPLOAD = 1_000_000_000
"""Bytes of an upload above which a submission fails, unless more is allowed."""
_SHOWN = 5


class Allowances(NamedTuple):
    """What a person allows: files by name or path, and the size of an upload in bytes."""

    names: tuple[str, ...] = ()
    """A name (``.env``) allows every file or folder of that name, a path only that one."""
    upload: int = LARGEST_UPLOAD
    asked: bool = True
    """Whether a person at a terminal is asked above `ASKED_ABOVE`: not if they named a size."""
    links: bool = True
    """Whether the working directory's path may contain links: not if the path was checked before."""


NO_MORE = Allowances()
"""Nothing beyond the rules."""


def allowed(names: Sequence[str] = (), max_upload: str | int | None = None) -> Allowances:
    """Return the allowances for options as a person writes them.

    Raises:
        SpecError: `max_upload` is not a size.
    """
    plain = tuple(name.strip().removeprefix("./").rstrip("/") for name in names)
    if max_upload is None:
        return Allowances(plain)
    try:
        size = size_bytes(max_upload)
    except ValueError as error:
        raise SpecError(str(error), field="max_upload") from None
    if not isinstance(size, int) or size <= 0:
        msg = f"{max_upload!r} is not the size of an upload"
        raise SpecError(msg, field="max_upload", hint="write for example 5GB")
    return Allowances(plain, size, asked=False)


def is_allowed(path: str, names: Sequence[str]) -> bool:
    """Return whether a file, or a folder above it, was allowed by name or by path."""
    parts = path.split("/")
    places = {"/".join(parts[: at + 1]) for at in range(len(parts))}
    return any(name in places or name in parts for name in names)


def refuse_secrets(paths: Sequence[str]) -> None:
    """Refuse a package with files that look like secrets.

    Raises:
        WithheldError: `paths` is not empty.
    """
    if not paths:
        return
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    msg = f"these files look like secrets: {', '.join(paths[:_SHOWN])}{more}"
    options = " ".join(f"--allow {path}" for path in paths[:_SHOWN])
    raise WithheldError(
        msg,
        hint="leave them out with lines in .raylaunchignore, and give the job their values with raylaunch secret set "
        f"NAME and --secret NAME; or send them: {options} (Python: allow={list(paths[:_SHOWN])})",
        paths=tuple(paths),
    )


def refuse_home(root: Path) -> None:
    """Refuse to pack a home folder or a folder above one; `root` is resolved.

    Raises:
        SpecError: it is one.
    """
    for home in _homes():
        if home == root or root in home.parents:
            what = "your home folder" if home == root != Path("/") else "not a project: your home folder is below it"
            msg = f"{root} is {what}; it is not sent as a working directory"
            hint = "cd into the project, or name it: --working-dir PROJECT; --working-dir '' sends no files"
            raise SpecError(msg, field="working_dir", hint=hint)


def _homes() -> set[Path]:
    """Return the homes that the environment and the account name; `/` if there is none."""
    named = [os.environ.get("HOME", "")]
    with contextlib.suppress(KeyError):
        named.append(pwd.getpwuid(os.getuid()).pw_dir)
    return {Path(home).resolve() for home in named if home.startswith("/")} or {Path("/")}


def too_large(limit: int, largest: Sequence[FileFact]) -> WithheldError:
    """Return the error for a package larger than `limit`, in bytes."""
    files = ", ".join(f"{one.path} ({one.bytes / 1e6:.0f} MB)" for one in largest)
    return WithheldError(
        f"the working directory has more than {_size(limit)} to upload; its largest files: {files}",
        hint="keep data on the nodes, and leave it out with lines in .raylaunchignore; or allow more: "
        "--max-upload 5GB (Python: max_upload='5GB')",
    )


def _size(size: int) -> str:
    return f"{size / 1e9:g} GB" if size >= LARGEST_UPLOAD else f"{size / 1e6:g} MB"


FETCHED = "built in: files that raylaunch get wrote"
"""The rule that leaves out downloaded files."""
_FOLDER = ".raylaunch"
_FILE = "fetched.json"
_LARGEST = 16 * 1024 * 1024


class Stamp(NamedTuple):
    """Size and modification time of a downloaded file."""

    bytes: int
    mtime_ns: int

    def is_still(self, entry: os.DirEntry[str]) -> bool:
        """Return whether the file is unchanged."""
        seen = entry.stat(follow_symlinks=False)
        return (seen.st_size, seen.st_mtime_ns) == self


def fetched_in(folder: Path) -> Mapping[str, Stamp]:
    """Return the files below `folder` that were downloaded into it, by their relative names."""
    return {name: stamp for files in _read(folder).values() for name, stamp in files.items()}


class FetchedFiles:
    """The files that were downloaded into one folder, by job; saved with `save`."""

    def __init__(self, folder: Directory) -> None:
        self._folder = folder
        self._jobs = {job: dict(files) for job, files in _read(folder.path).items()}
        self._changed = False

    def of_others(self, job: str) -> tuple[str, ...]:
        """Return the other jobs whose files are still here, changed or not."""
        return tuple(one for one, files in self._jobs.items() if one != job and any(map(self._is_here, files)))

    def _is_here(self, name: str) -> bool:
        return os.path.lexists(self._folder.path / name)

    def is_unchanged(self, job: str, name: str, here: os.stat_result) -> bool:
        """Return whether a file is unchanged since an earlier download of this job."""
        return self._jobs.get(job, {}).get(name) == Stamp(here.st_size, here.st_mtime_ns)

    def add(self, job: str, name: str, here: os.stat_result) -> None:
        """Add a file of `job` that was just downloaded."""
        for files in self._jobs.values():
            files.pop(name, None)
        self._jobs.setdefault(job, {})[name] = Stamp(here.st_size, here.st_mtime_ns)
        self._changed = True

    def save(self) -> None:
        """Write the record.

        Raises:
            OSError: it cannot be written, or is a link.
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
