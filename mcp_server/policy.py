"""What this server may do: its role, the local paths that tools may use, and the audit log of writes."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mcp_server.render import Json, plain
from raylaunch.client.sensitive import Allowances, allowed
from raylaunch.errors import SpecError
from raylaunch.files import Directory
from raylaunch.paths import storage_errors

ROOTS_VARIABLE = "RAYLAUNCH_MCP_ROOTS"
LONGEST_FILE = 1024 * 1024
ROLE_VARIABLE = "RAYLAUNCH_ROLE"
ALLOW_VARIABLE = "RAYLAUNCH_ALLOW"
"""Names of files, separated by colons, that may be sent although they look like secrets."""
UPLOAD_VARIABLE = "RAYLAUNCH_MAX_UPLOAD"
AUDIT_FILE = "mcp-audit.jsonl"
_READS = "viewer"
_WRITES = ("trainer", "operator", "admin")
_LONGEST = 500


def may_write(environ: Mapping[str, str]) -> bool:
    """Return whether tools that write are offered: not to a ``viewer``. What the token may do, the controller decides.

    Raises:
        SpecError: ``$RAYLAUNCH_ROLE`` is no role.
    """
    role = environ.get(ROLE_VARIABLE, "").strip().lower()
    if role and role != _READS and role not in _WRITES:
        msg = f"{ROLE_VARIABLE}={role} is not a role"
        raise SpecError(msg, hint=f"set it to {_READS} for a server that only reads, or to one of {', '.join(_WRITES)}")
    return role != _READS


def may_send(environ: Mapping[str, str]) -> Allowances:
    """Return which files that look like secrets may be sent, and how large an upload may be.

    A person says so when they configure the server; no argument of a tool does, because an agent may be misled. Paths
    are checked by the tools, so what has become a link since is not packed.

    Raises:
        SpecError: ``$RAYLAUNCH_MAX_UPLOAD`` is not a size.
    """
    names = [name for name in environ.get(ALLOW_VARIABLE, "").split(":") if name]
    return allowed(names, environ.get(UPLOAD_VARIABLE) or None)._replace(links=False)


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
            raise SpecError(msg, field=field, hint="name a file in the project, for example job.yaml") from None
        except UnicodeDecodeError:
            msg = f"{field}: {shown} is not UTF-8 text"
            raise SpecError(msg, field=field, hint="save it as UTF-8") from None
        msg = f"{field}: {shown} is longer than {LONGEST_FILE} bytes"
        raise SpecError(msg, field=field, hint="name a file in the project, for example job.yaml")


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
            raise SpecError(
                msg, field=field, hint="name a folder or file in the project, for example models/digits"
            ) from None
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
            hint = f"name folders of projects, with {os.pathsep!r} between them, for example /home/alice/projects"
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


class Audit:
    """A line before each write and one after it, in a file that only its owner can read."""

    def __init__(self, home: Path) -> None:
        self._path = home / AUDIT_FILE

    def asked(self, tool: str, arguments: Mapping[str, object]) -> str:
        """Note what was asked for, values of environment variables left out; return the call's mark.

        Raises:
            StorageError: it cannot be noted; then it must not be done.
        """
        call = secrets.token_hex(6)
        self._add({"at": time.time(), "call": call, "tool": tool, "pid": os.getpid(), "asked": _noted(arguments)})
        return call

    def answered(self, call: str, outcome: str, *, job: str = "") -> None:
        """Note how it ended.

        Raises:
            StorageError: it cannot be noted.
        """
        self._add({"at": time.time(), "call": call, "outcome": outcome, "job": job})

    def _add(self, entry: Json) -> None:
        line = json.dumps(plain(entry), ensure_ascii=False) + "\n"
        with storage_errors(self._path):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            descriptor = os.open(self._path, flags, 0o600)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)


def _noted(arguments: Mapping[str, object]) -> Json:
    return {name: _short(_without_values(name, value)) for name, value in arguments.items()}


def _without_values(name: str, value: object) -> object:
    if not isinstance(value, dict):
        return value
    if name == "env":
        return dict.fromkeys(value, "…")
    return {str(key): _without_values(str(key), item) for key, item in value.items()}


def _short(value: object) -> object:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return value if len(text) <= _LONGEST else text[:_LONGEST] + "…"
