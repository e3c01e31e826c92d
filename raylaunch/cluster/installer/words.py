"""What is asked of the installer, how it answers, and its problems in words."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class File:
    """A wheel, in the host's folder of wheels or on its way there."""

    sha256: str
    file: str
    name: str = ""
    version: str = ""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    verb: str
    """``look``, ``make`` or ``add_beside``."""
    root: str
    """raylaunch's folder; ``~`` is the home of who runs this."""
    name: str
    """Of the environment."""
    named: bool = False
    """Whether it goes beside an environment that the user names, whose interpreter runs this."""
    arch: str = ""
    minor: str = ""
    """Of the machine and the Python that the environment was planned for."""
    versions: dict[str, str] = field(default_factory=dict)
    """What must be installed in it in the end."""
    imports: list[str] = field(default_factory=list)
    """Modules that must be importable in the end."""
    requirements: list[str] = field(default_factory=list)
    preferences: dict[str, str] = field(default_factory=dict)
    """Versions to take where they fit, by name."""
    wheels: list[File] = field(default_factory=list)
    """With none, the host's package index is asked."""
    own: File | None = None
    """raylaunch's own wheel."""
    uv: File | None = None
    """uv's wheel; with none, the host's own uv is looked for."""

    @staticmethod
    def read(body: str) -> Request:
        """Read a request as the client wrote it."""
        facts = json.loads(body)
        for name in ("own", "uv"):
            facts[name] = File(**facts[name]) if facts.get(name) else None
        return Request(**facts | {"wheels": [File(**wheel) for wheel in facts.get("wheels", [])]})

    def files(self) -> list[File]:
        """Return all wheels that must be on the host."""
        return [*self.wheels, *(file for file in (self.own, self.uv) if file is not None)]


class Problem(Exception):  # noqa: N818 -- the word of the answers
    """Why it cannot go on, in words for a person. `code` is the class of the error at the client."""

    code = "host_step"

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class StorageProblem(Problem):
    """A disk is full or cannot be used."""

    code = "host_storage"


class VersionProblem(Problem):
    """What is there does not fit what is asked for."""

    code = "version"


class TransferProblem(Problem):
    """A file that should have been pushed is not there."""

    code = "transfer"


class ConflictProblem(Problem):
    """Somebody else holds it."""

    code = "conflict"


def say(kind: str, body: object) -> None:
    """Answer with one line."""
    os.write(1, json.dumps({kind: body}, separators=(",", ":")).encode() + b"\n")


def goes(message: str) -> None:
    """Say how far it is."""
    say("step", {"name": "install", "state": "waits", "message": message, "seconds": 0.0})


def storage_problem(error: OSError, path: Path) -> StorageProblem:
    """Say what the operating system had against `path`, with the free bytes if the disk is full."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = shutil.disk_usage(existing(path)).free
        msg = f"no space left to write {path}: {free} bytes free"
        return StorageProblem(msg, "free some space there, or set root: to a folder on another disk of that host")
    msg = f"cannot use {path}: {error.strerror or error}"
    return StorageProblem(msg, "check who owns it and its modes, or set root: to another folder of that host")


def existing(path: Path) -> Path:
    """Return the nearest folder on the way to `path` that is there."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
