"""Which host keys are trusted: known_hosts files, pinned fingerprints, and what a person accepts."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import asyncssh

from raylaunch.errors import HostKeyError, SpecError
from raylaunch.paths import make_private_dir, storage_errors
from raylaunch.ssh.target import Target, own_known_hosts

_log = logging.getLogger(__name__)

_DEFAULT_PORT = 22
_REVOKED = "@revoked"
_SYSTEM = (Path("/etc/ssh/ssh_known_hosts"), Path("/etc/ssh/ssh_known_hosts2"))

# By family, the preferred first. A pinned fingerprint may be of any key that the host has, so each is requested.
FAMILIES = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521",
    "rsa-sha2-512,rsa-sha2-256",
)


@dataclass(frozen=True)
class KnownKeys:
    """What the files have on one host and port. `where` maps each key's fingerprint to its file."""

    keys: tuple[asyncssh.SSHKey, ...] = ()
    authorities: tuple[asyncssh.SSHKey, ...] = ()
    revoked: tuple[asyncssh.SSHKey, ...] = ()
    where: dict[str, Path] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Nothing is known: neither a key nor an authority that could vouch for one."""
        return not (self.keys or self.authorities)

    def as_asyncssh(self) -> tuple[Sequence[asyncssh.SSHKey], ...]:
        """Return it as asyncssh takes it."""
        return (self.keys, self.authorities, self.revoked)


def files_for(target: Target, configured: object) -> list[Path]:
    """Return the known_hosts files that count for a host, the most specific first.

    Args:
        target: the host; a file that it names is the only one.
        configured: ``UserKnownHostsFile`` and ``GlobalKnownHostsFile`` of the person's configuration, if any.
    """
    if target.known_hosts is not None:
        return [target.known_hosts]
    named = [Path(str(one)).expanduser() for one in configured] if isinstance(configured, list | tuple) else []
    return [own_known_hosts(), *(named or [Path("~/.ssh/known_hosts").expanduser()]), *_SYSTEM]


def known(files: Iterable[Path], host: str, port: int) -> KnownKeys:
    """Return what `files` have on a host, as `ssh` reads them: also hashed names, patterns and authorities.

    Raises:
        SpecError: a line that marks a key as revoked cannot be read.
    """
    keys: list[asyncssh.SSHKey] = []
    authorities: list[asyncssh.SSHKey] = []
    revoked: list[asyncssh.SSHKey] = []
    where: dict[str, Path] = {}
    at = None if port == _DEFAULT_PORT else port
    for file in files:
        read = _read(file)
        found = read.vouched.match(host, "", at)
        keys += found[0]
        authorities += found[1]
        revoked += [*found[2], *read.revoked.match(host, "", at)[0]]
        for key in found[0]:
            where.setdefault(key.get_fingerprint(), file)
    return KnownKeys(tuple(keys), tuple(authorities), tuple(revoked), where)


class _Read(NamedTuple):
    """A known_hosts file. Revoked keys separately too: asyncssh forgets those of a port where it knows no good key."""

    vouched: asyncssh.SSHKnownHosts
    revoked: asyncssh.SSHKnownHosts


def _read(file: Path) -> _Read:
    try:
        facts = file.stat()
    except OSError:
        return _Read(asyncssh.SSHKnownHosts(), asyncssh.SSHKnownHosts())
    return _parse(file, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=16)
def _parse(file: Path, _changed: int, _size: int) -> _Read:
    """Read a file, once for all hosts. A line that cannot be read is ignored, as `ssh` does."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found, revoked = asyncssh.SSHKnownHosts(), asyncssh.SSHKnownHosts()
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            found.load(line)
            if line.lstrip().startswith(_REVOKED):
                revoked.load(line.lstrip().removeprefix(_REVOKED).lstrip())
        except ValueError as error:  # noqa: PERF203 -- each line for itself
            if line.lstrip().startswith(_REVOKED):  # left out, it would let in what it is to keep out
                msg = f"a revoked key cannot be read: {error}"
                raise SpecError(msg, hint="repair that line", where=f"{file}:{number}") from None
            _log.warning("%s:%d is ignored: %s", file, number, error)
    return _Read(found, revoked)


class HostKeyWatch(asyncssh.SSHClient):
    """Sees what a host shows: `shown` is a key that no file vouches for. The pinned one is accepted."""

    def __init__(self, pinned: str) -> None:
        self._pinned = pinned
        self._connection: asyncssh.SSHClientConnection | None = None
        self.shown: asyncssh.SSHKey | None = None

    @property
    def spoke(self) -> bool:
        """Whether the host has sent its version."""
        return self._connection is not None and bool(self._connection.get_extra_info("server_version"))

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        """Take note of the connection."""
        self._connection = conn

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Return whether a key that is in no file is trusted."""
        del host, addr, port
        self.shown = key
        return bool(self._pinned) and key.get_fingerprint() == self._pinned

    def validate_host_ca_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Return whether an authority that is in no file is trusted: never."""
        del host, addr, port
        self.shown = key
        return False


def entry(name: str, port: int) -> str:
    """Return how known_hosts calls a host at a port."""
    return name if port == _DEFAULT_PORT else f"[{name}]:{port}"


def accept(key: asyncssh.SSHKey, name: str, file: Path) -> None:
    """Append a key that a person accepted to `file`, 0600, for exactly this host and port (see `entry`).

    Raises:
        StorageError: the file cannot be written.
    """
    line = f"{name} {key.export_public_key('openssh').decode().strip()}\n"
    with storage_errors(file):
        if not file.parent.is_dir():
            make_private_dir(file.parent)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(line.encode())


def describe(key: asyncssh.SSHKey) -> str:
    """Return a key's kind and fingerprint, as `ssh` shows them."""
    kind = key.get_algorithm().removeprefix("ssh-").removeprefix("ecdsa-sha2-").upper()
    return f"{kind} {key.get_fingerprint()}"


def unknown_error(target: Target, key: asyncssh.SSHKey, address: str) -> HostKeyError:
    """Return an error: the host is not known yet, with its fingerprint and the ways to accept it."""
    fingerprint = key.get_fingerprint()
    msg = f"{target.name} ({address}) is not known here: it shows the host key {describe(key)}"
    hint = (
        "compare that with the host's own (on it: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub); if they are the "
        f"same, accept it in a terminal with raylaunch, or write it into cluster.yaml as  fingerprint: {fingerprint}"
    )
    return HostKeyError(msg, hint=hint, host=target.name, step="host key", fingerprint=fingerprint)


def changed_error(target: Target, key: asyncssh.SSHKey, address: str, name: str, expected: KnownKeys) -> HostKeyError:
    """Return an error: the host shows another key than the known one; with the command that removes it."""
    old = ", ".join(describe(one) for one in expected.keys) or "one signed by a known authority"
    file = next(iter(expected.where.values()), None)
    msg = f"{target.name} ({address}) shows another host key than before: {describe(key)}; known is {old}" + (
        f" in {file}" if file else ""
    )
    hint = (
        "somebody may be between you and the host. If it was reinstalled, compare the new fingerprint with the host's "
        f"own, then forget the old: ssh-keygen -R '{name}'" + (f" -f {file}" if file else "")
    )
    return HostKeyError(
        msg,
        hint=hint,
        host=target.name,
        step="host key",
        fingerprint=key.get_fingerprint(),
        known=tuple(one.get_fingerprint() for one in expected.keys),
    )


def contradicted_error(target: Target, address: str, name: str, expected: KnownKeys) -> HostKeyError:
    """Return an error: known_hosts has another key of the host than the one that cluster.yaml pins."""
    known = ", ".join(describe(one) for one in expected.keys)
    file = next(iter(expected.where.values()), None)
    msg = f"{target.name} ({address}): cluster.yaml pins {target.fingerprint}, and {file or 'known_hosts'} has {known}"
    hint = (
        "compare both with the host's own key; then change `fingerprint` in cluster.yaml, or forget the old key: "
        f"ssh-keygen -R '{name}'" + (f" -f {file}" if file else "")
    )
    known_keys = tuple(one.get_fingerprint() for one in expected.keys)
    return HostKeyError(
        msg, hint=hint, host=target.name, step="host key", fingerprint=target.fingerprint, known=known_keys
    )


def pinned_error(target: Target, key: asyncssh.SSHKey, address: str) -> HostKeyError:
    """Return an error: the host shows another key than the pinned one."""
    msg = f"{target.name} ({address}) shows the host key {describe(key)}, and {target.fingerprint} is pinned for it"
    hint = (
        "somebody may be between you and the host. If it was reinstalled, compare the new fingerprint with the host's "
        "own, then change `fingerprint` in cluster.yaml"
    )
    return HostKeyError(
        msg,
        hint=hint,
        host=target.name,
        step="host key",
        fingerprint=key.get_fingerprint(),
        known=(target.fingerprint,),
    )
