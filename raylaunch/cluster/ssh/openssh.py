"""How the `ssh` that is installed here connects to a host: its ciphers are cheaper than those in Python.

An extra, for many bytes: where there is no such program, or it gets no connection by itself, ours is there anyway. It
asks nobody anything, and trusts the same files of host keys. `raylaunch.cluster.reach.straight` runs it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from raylaunch.cluster.ssh.places import Place, places_of
from raylaunch.cluster.ssh.target import Target

_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
_CONNECT_S = 10
_KEEPALIVE_S = 5
_KEEPALIVES_MISSED = 3
_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


def command(target: Target) -> list[str] | None:
    """Return the command that connects to the target.

    None where there is none: no such program, or a pinned fingerprint, which it cannot compare.

    Raises:
        SpecError: the SSH configuration cannot be read.
    """
    program = shutil.which("ssh")
    place = places_of(target, final=target)[-1]
    if program is None or target.fingerprint:
        return None
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "UserKnownHostsFile": " ".join(f'"{file}"' for file in place.known_files),
        "ConnectTimeout": str(_CONNECT_S),
        "ServerAliveInterval": str(_KEEPALIVE_S),
        "ServerAliveCountMax": str(_KEEPALIVES_MISSED),
        "ControlMaster": "no",  # a connection that is shared is one stream of ciphers
        "ControlPath": "none",
        "LogLevel": "ERROR",
        **({} if place.ciphers else {"Ciphers": _CIPHERS}),
        **({"ProxyJump": ",".join(target.jump)} if target.jump else {}),
    }
    words = [program, "-F", *(place.config or ("none",)), "-p", str(place.port)]
    for name, value in options.items():
        words += ["-o", f"{name}={value}"]
    for key in _keys(place):
        words += ["-i", key]
    return [*words, "-l", place.user, "--", target.alias]


def _keys(place: Place) -> list[str]:
    """Those that it would not find itself: it looks for its own below the account's home, whatever HOME says."""
    named = [str(Path(place.target.key).expanduser())] if place.target.key else []
    usual = (Path("~/.ssh").expanduser() / name for name in _KEYS)
    return named or ([] if place.identity_files else [str(path) for path in usual if path.exists()])
