"""What the command of the `ssh` that is installed (`raylaunch.cluster.ssh.openssh`) is for. Loads nothing of SSH."""

from __future__ import annotations

from collections.abc import Sequence


def to_port(words: Sequence[str], host: str, port: int) -> list[str]:
    """Return the command whose stdin and stdout are a connection to `host`:`port`, as its host sees them."""
    return [words[0], "-W", f"{host}:{port}", *words[1:]]


def to_program(words: Sequence[str], command: str) -> list[str]:
    """Return the command whose stdin and stdout are those of a command that its host's login shell runs."""
    return [words[0], "-T", "-o", "RemoteCommand=none", *words[1:], command]
