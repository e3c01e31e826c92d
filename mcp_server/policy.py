"""What this server may do, and what it did: the role that it was started with, and the audit of writes."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from mcp_server.render import Json, plain
from raylaunch.client.sensitive import Allowances, allowed
from raylaunch.errors import SpecError
from raylaunch.paths import storage_errors

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
