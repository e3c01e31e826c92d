"""Which local paths a tool may use: one function for every path argument, and files opened without following links."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from raylaunch.errors import SpecError
from raylaunch.files import Directory

ROOTS_VARIABLE = "RAYLAUNCH_MCP_ROOTS"
LONGEST_FILE = 1024 * 1024


class LocalPath(NamedTuple):
    """A path that a tool may use: `parts` below one of the roots, without links when it was checked."""

    root: Path
    parts: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The absolute path."""
        return self.root.joinpath(*self.parts)

    def directory(self, *, make: bool = False) -> Directory:
        """Open it as a directory, name by name; a link that has appeared since the check is refused.

        Raises:
            OSError: it is no directory, or cannot be opened or created.
        """
        with Directory.open_resolved(self.root) as root:
            return root.below(self.parts, make=make)

    def read_text(self, *, field: str) -> str:
        """Return the text of a file; no error quotes any of it.

        Raises:
            SpecError: it is no file, cannot be read, is not UTF-8 or too long.
        """
        shown = self.path
        try:
            with (
                LocalPath(self.root, self.parts[:-1]).directory() as folder,
                os.fdopen(folder.open_file(self.parts[-1], os.O_RDONLY), "rb") as file,
            ):
                data = file.read(LONGEST_FILE + 1)
            if len(data) <= LONGEST_FILE:
                return data.decode("utf-8")
        except (OSError, IndexError) as error:
            why = getattr(error, "strerror", None) or "it is not a file"
            msg = f"{field}: {shown} cannot be read: {why}"
            raise SpecError(msg, field=field, hint="name a file in the project, as job.yaml") from None
        except UnicodeDecodeError:
            msg = f"{field}: {shown} is not UTF-8 text"
            raise SpecError(msg, field=field, hint="save it as UTF-8") from None
        msg = f"{field}: {shown} is longer than {LONGEST_FILE} bytes"
        raise SpecError(msg, field=field, hint="name a file in the project, as job.yaml")


class Roots:
    """The folders that tools may read and write in.

    Args:
        here: where the server was started.
        folders: the folders; the first is where relative paths start.
    """

    def __init__(self, here: Path, folders: tuple[Path, ...]) -> None:
        self._here = here
        self._folders = folders

    @property
    def working_dir(self) -> str:
        """The folder that is packed where none is named: where the server was started.

        Raises:
            SpecError: that is not one of the folders.
        """
        if self._here in self._folders:
            return str(self._here)
        msg = f"this server was started in {self._here}, which is not packed as a whole"
        raise SpecError(msg, field="working_dir", hint="name the project's folder as working_dir")

    def resolve(self, text: str, *, field: str, base: Path | None = None, quoted: bool = True) -> LocalPath:
        """Return the path that an argument means, resolved.

        Args:
            text: as it was given; relative to `base`.
            field: the argument, for errors.
            base: by default where the server was started, if that is one of the folders; else the first of them.
            quoted: whether errors may repeat `text`; not where it was read from a file.

        Raises:
            SpecError: it cannot be a path, leads out of the folders, or has a part below them that starts with a dot.
        """
        shown = repr(text[:80]) if quoted else "the path that the file gives"
        if not self._folders:
            msg = f"{field}: this server was started in {self._here}, so it uses no local paths"
            hint = f"a person starts it in the project's folder, or sets {ROOTS_VARIABLE} to the folders it may use"
            raise SpecError(msg, field=field, hint=hint)
        try:
            path = ((base or self._folders[0]) / Path(text).expanduser()).resolve()
            path.exists()
        except (OSError, RuntimeError, ValueError) as error:
            why = f": {getattr(error, 'strerror', None) or error}" if quoted else ""
            msg = f"{field}: {shown} cannot be a path here{why}"
            raise SpecError(msg, field=field, hint="name a folder or file in the project, as models/digits") from None
        root = next((root for root in self._longest_first if path.is_relative_to(root)), None)
        if root is None:
            msg = f"{field}: {shown} is outside of the folders that this server may use"
            named = ", ".join(str(root) for root in self._folders)
            hint = f"they are {named}; a person adds others with {ROOTS_VARIABLE}"
            raise SpecError(msg, field=field, hint=hint)
        parts = path.relative_to(root).parts
        if any(part.startswith(".") for part in parts):
            msg = f"{field}: {shown} is hidden: a part of it starts with a dot"
            raise SpecError(msg, field=field, hint="these tools use no hidden files or folders; name another")
        return LocalPath(root, parts)

    @property
    def _longest_first(self) -> list[Path]:
        return sorted(self._folders, key=lambda root: -len(root.parts))


def roots_of(environ: Mapping[str, str], cwd: Path) -> Roots:
    """Return the folders that a server may use.

    They are the one where it was started, unless that is ``/`` or holds a home folder, and those that a person named in
    ``$RAYLAUNCH_MCP_ROOTS``.

    Raises:
        SpecError: a named folder is not there, is not absolute, or is ``/`` or holds a home folder.
    """
    here = cwd.resolve()
    homes = _homes(environ)
    folders = [] if _too_wide(here, homes) else [here]
    for word in filter(None, environ.get(ROOTS_VARIABLE, "").split(os.pathsep)):
        root = _named_root(word)
        if root is None or _too_wide(root, homes):
            why = "is not the full path of a folder" if root is None else "is /, or holds a home folder"
            msg = f"{ROOTS_VARIABLE}: {word} {why}"
            hint = f"name folders of projects, with {os.pathsep!r} between them, as /home/alice/projects"
            raise SpecError(msg, hint=hint)
        folders.append(root)
    return Roots(here, tuple(dict.fromkeys(folders)))


def _named_root(word: str) -> Path | None:
    try:
        named = Path(word).expanduser()
        return named.resolve() if named.is_absolute() and named.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _homes(environ: Mapping[str, str]) -> set[Path]:
    homes = {Path(environ["HOME"]).resolve()} if environ.get("HOME") else set()
    with contextlib.suppress(KeyError):  # an account without an entry, as in a container
        homes.add(Path(pwd.getpwuid(os.getuid()).pw_dir).resolve())
    return homes


def _too_wide(folder: Path, homes: set[Path]) -> bool:
    return folder.parent == folder or any(home.is_relative_to(folder) for home in homes)
