"""The installer's request, the lines of its answer, and its errors."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class File:
    """A wheel in the host's folder of wheels, or in the bundle that is unpacked there."""

    sha256: str
    file: str
    name: str = ""
    version: str = ""


@dataclass(frozen=True)
class Request:
    """One request."""

    verb: str
    """``look``, ``make`` or ``add_beside``."""
    root: str
    """raylaunch's folder; ``~`` is the home of this account."""
    name: str
    """Of the environment."""
    named: bool = False
    """Whether it extends an environment that the user names, whose interpreter runs this."""
    arch: str = ""
    minor: str = ""
    """Of the machine and the Python that the environment was planned for."""
    versions: dict[str, str] = field(default_factory=dict)
    """The versions that must be installed in the end."""
    imports: list[str] = field(default_factory=list)
    """Modules that must be importable in the end."""
    requirements: list[str] = field(default_factory=list)
    preferences: dict[str, str] = field(default_factory=dict)
    """Versions to take where they fit, by name."""
    wheels: list[File] = field(default_factory=list)
    """If empty, packages come from the host's package index."""
    own: File | None = None
    """raylaunch's own wheel."""
    bundle: str = ""
    """Path of a file that holds several of these wheels, if they were pushed in one."""
    uv: File | None = None
    """uv's wheel; if None, the host's own uv is used."""

    @staticmethod
    def read(body: str) -> Request:
        """Parse a request."""
        facts = json.loads(body)
        for name in ("own", "uv"):
            facts[name] = File(**facts[name]) if facts.get(name) else None
        return Request(**facts | {"wheels": [File(**wheel) for wheel in facts.get("wheels", [])]})

    def files(self) -> list[File]:
        """Return all wheels that must be on the host."""
        return [*self.wheels, *(file for file in (self.own, self.uv) if file is not None)]


class InstallerProblem(Exception):  # noqa: N818 -- the word of the answers
    """Why the installer stops, in a sentence for a person. `code` is the class of the error at the client."""

    def __init__(
        self,
        message: str,
        hint: str,
        *,
        code: Literal["host_step", "host_storage", "version", "transfer", "conflict"] = "host_step",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


def report(kind: str, body: object) -> None:
    """Write one line of the answer."""
    os.write(1, json.dumps({kind: body}, separators=(",", ":")).encode() + b"\n")


def report_progress(message: str) -> None:
    """Report what is being done."""
    report("step", {"name": "install", "state": "waits", "message": message, "seconds": 0.0})
