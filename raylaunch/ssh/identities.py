"""Which of a person's keys are offered to a host: what `ssh` would offer, from files and from the agent."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from raylaunch.errors import HostAuthError
from raylaunch.ssh.target import OnPrompt, Prompt, Target

_DEFAULT_NAMES = ("id_ed25519_sk", "id_ecdsa_sk", "id_ed25519", "id_ecdsa", "id_rsa")
_PASSPHRASE_TRIES = 3


@dataclass(frozen=True)
class Identities:
    """Keys to offer from files, by `names`; those that are `locked` need a passphrase first.

    `only` are the agent's keys that may be used, None for all. `first`: the files come before the agent.
    """

    keys: tuple[asyncssh.SSHKeyPair, ...] = ()
    only: tuple[bytes, ...] | None = None
    names: tuple[str, ...] = ()
    locked: tuple[Path, ...] = ()
    first: bool = False


def identities(target: Target, *, configured: Sequence[str], only_these: bool, extra: str = "") -> Identities:
    """Gather the keys for a host.

    Args:
        target: the host; a key that it names is the only one.
        configured: ``IdentityFile`` of the person's configuration; empty means the usual names in ``~/.ssh``.
        only_these: ``IdentitiesOnly``: of the agent's keys, only those that are also in files.
        extra: a further key file; for a jump host, the key of the host behind it.

    Raises:
        HostAuthError: the key file that the target names is missing or cannot be read.
    """
    named = (target.key, extra) if target.key else (*configured, extra) if configured else (*_defaults(), extra)
    files = [Path(one).expanduser() for one in named if one]
    if target.key and not _exists(files[0]):
        msg = f"the key {files[0]} for {target.name} does not exist"
        raise HostAuthError(msg, hint="name the private key's file, like key: ~/.ssh/id_ed25519", host=target.name)
    keys: list[asyncssh.SSHKeyPair] = []
    names: list[str] = []
    locked: list[Path] = []
    public: list[bytes] = []
    for file in files:
        if not _exists(file):
            continue
        names.append(str(file))
        public += _public(file)
        if opened := _opened(file):
            keys += opened
            continue
        try:
            keys += asyncssh.load_keypairs([str(file)])
        except (asyncssh.KeyImportError, OSError) as error:
            if isinstance(error, asyncssh.KeyEncryptionError) or str(error).startswith("Passphrase"):
                locked.append(file)
            elif target.key and not public:
                msg = f"the key {file} for {target.name} cannot be read: {error}"
                raise HostAuthError(msg, hint="name a private key in OpenSSH or PEM form", host=target.name) from None
    public += [pair.public_data for pair in keys]
    only = tuple(public) if target.key or only_these else None
    return Identities(
        keys=tuple(keys),
        only=only,
        names=tuple(names),
        locked=tuple(locked),
        first=bool(target.key or configured),
    )


# Keys opened in this process, by file and its state: a passphrase is asked for once for all hosts.
_OPENED: dict[tuple[Path, int, int], list[asyncssh.SSHKeyPair]] = {}


async def unlock(files: Iterable[Path], target: Target, on_prompt: OnPrompt) -> list[asyncssh.SSHKeyPair]:
    """Ask for the passphrases of encrypted keys; return those keys that could be opened."""
    keys: list[asyncssh.SSHKeyPair] = []
    for file in files:
        again = ""
        for _ in range(_PASSPHRASE_TRIES):
            if opened := _opened(file):
                keys += opened
                break
            text = f"{again}Passphrase for the key {file} (for {target.name}): "
            answer = await on_prompt(Prompt("passphrase", target.name, text, path=str(file)))
            if not answer:
                break
            try:
                _OPENED[_state(file)] = list(asyncssh.load_keypairs([str(file)], passphrase=answer))
            except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
                again = "Wrong passphrase. "
        else:
            keys += _opened(file)
    return keys


def _opened(file: Path) -> list[asyncssh.SSHKeyPair]:
    try:
        return _OPENED.get(_state(file), [])
    except OSError:  # only its public half is here
        return []


def _state(file: Path) -> tuple[Path, int, int]:
    facts = file.stat()
    return file, facts.st_mtime_ns, facts.st_ino


@asynccontextmanager
async def agent_keys(socket: str, only: Sequence[bytes] | None) -> AsyncIterator[list[asyncssh.SSHKeyPair]]:
    """Yield the keys that the agent offers, usable as long as the context lasts; none where no agent answers."""
    if not socket or only == ():
        yield []
        return
    try:
        agent = await asyncssh.connect_agent(socket)
    except OSError:  # a stale SSH_AUTH_SOCK, as after a reconnected terminal
        yield []
        return
    try:
        yield list(await agent.get_keys(list(only) if only is not None else None))
    finally:
        agent.close()


def agent_socket(configured: object) -> str:
    """Return the agent's socket: ``IdentityAgent`` of the configuration, else ``SSH_AUTH_SOCK``."""
    named = configured if isinstance(configured, str) else os.environ.get("SSH_AUTH_SOCK", "")
    return "" if named in {"", "none"} else str(Path(named).expanduser())


def refused_error(target: Target, user: str, tried: Sequence[str], locked: Sequence[Path], why: str) -> HostAuthError:
    """Return an error: the host accepted none of the keys; with those tried, and what to do."""
    usable = [name for name in tried if Path(name) not in locked]
    offered = ", ".join(usable) if usable else "no key (none is in ~/.ssh or in an agent)"
    if locked and not usable:
        offered = "no key"
    msg = f"{target.name} refuses {user}: offered {offered}; {why}"
    if locked:
        files = ", ".join(str(one) for one in locked)
        msg = f"{msg}; {files} needs a passphrase"
        hint = f"unlock it for this session: ssh-add {locked[0]}"
    elif usable:
        hint = f"check the user name, or add your key on the host: ssh-copy-id -i {_pub(usable)} {user}@{target.alias}"
    else:
        hint = f"make a key and put it on the host: ssh-keygen -t ed25519, then ssh-copy-id {user}@{target.alias}"
    return HostAuthError(msg, hint=hint, host=target.name, step="log in", tried=tuple(usable))


def _pub(names: Sequence[str]) -> str:
    return next((f"{name.removesuffix('.pub')}.pub" for name in names if name.startswith("/")), "~/.ssh/id_ed25519.pub")


def _defaults() -> list[str]:
    return [f"~/.ssh/{name}" for name in _DEFAULT_NAMES]


def _exists(file: Path) -> bool:
    return file.is_file() or Path(f"{file}.pub").is_file()


def _public(file: Path) -> list[bytes]:
    """Return the public half of a key file, from itself or from the ``.pub`` file; none where that is not known."""
    for path in (Path(f"{file}.pub"), file):
        with suppress(OSError, asyncssh.KeyImportError):
            return [asyncssh.read_public_key(path).public_data]
    return []
