"""What is asked of the installer, how it answers, and its problems in words."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field


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
    """``look``, ``make``, ``add_beside`` or ``unpack``."""
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
    bundle: str = ""
    """Path of a file that holds several of these wheels, if they were pushed so."""
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


class InstallerProblem(Exception):  # noqa: N818 -- the word of the answers
    """Why it cannot go on, in words for a person. `code` is the class of the error at the client."""

    code = "host_step"

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class StorageProblem(InstallerProblem):
    """A disk is full or cannot be used."""

    code = "host_storage"


class VersionProblem(InstallerProblem):
    """What is there does not fit what is asked for."""

    code = "version"


class TransferProblem(InstallerProblem):
    """A file that should have been pushed is not there."""

    code = "transfer"


class ConflictProblem(InstallerProblem):
    """Somebody else holds it."""

    code = "conflict"


def say(kind: str, body: object) -> None:
    """Answer with one line."""
    os.write(1, json.dumps({kind: body}, separators=(",", ":")).encode() + b"\n")


def goes(message: str) -> None:
    """Say how far it is."""
    say("step", {"name": "install", "state": "waits", "message": message, "seconds": 0.0})
