"""Checks an environment that the user names against what raylaunch needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys

from raylaunch.cluster.installer.words import Request, VersionProblem


def check_named(request: Request) -> None:
    """Refuse the environment that runs this if it lacks something, with the command that mends it.

    Raises:
        Problem: it lacks something.
    """
    wrong = [words for words in map(_what_is_wrong, request.requirements) if words]
    if wrong:
        command = " ".join([sys.executable, "-m", "pip", "install", *(f"'{one}'" for one in request.requirements)])
        msg = f"the environment of {sys.executable} does not fit: {'; '.join(wrong)}"
        raise VersionProblem(msg, f"on that host: {command}")


def _what_is_wrong(requirement: str) -> str:
    try:
        packaging = importlib.import_module("packaging.requirements")  # Ray needs it: where Ray is, it is
    except ImportError:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        return "" if _installed(name) else f"it has no {name}"
    parsed = packaging.Requirement(requirement)
    if parsed.marker is not None and not parsed.marker.evaluate():
        return ""
    version = _installed(parsed.name)
    if not version:
        return f"it has no {parsed.name}"
    fits = parsed.specifier.contains(version, prereleases=True)
    return "" if fits else f"it has {parsed.name} {version}, not {parsed.specifier}"


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
