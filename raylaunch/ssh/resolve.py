"""Resolving a target with the person's SSH configuration: its hops, and the command of `ssh` for it."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import asyncssh

from raylaunch.errors import SpecError
from raylaunch.ssh import host_keys
from raylaunch.ssh.identities import agent_socket
from raylaunch.ssh.target import Target

_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
_CONNECT_S = 10
_KEEPALIVE_S = 5
_KEEPALIVES_MISSED = 3
_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
_JUMPS_AT_MOST = 8
_HOP = re.compile(r"(?:(?P<user>[^@]+)@)?(?:\[(?P<six>[^\]@]+)\]|(?P<host>[^:\[\]@]+))(?::(?P<port>\d+))?")


def resolve_hops(target: Target, *, final: Target, depth: int = 0) -> list[ResolvedTarget]:
    """Return all hops to a target, itself the last. Reads files, connects to nothing.

    Args:
        target: where to.
        final: the host that all this is for, which errors name; the same as `target` for callers.
        depth: how many hops are between the two already.

    Raises:
        SpecError: the configuration cannot be read, or a jump host is none.
    """
    resolved = _resolve(target)
    if depth + len(resolved.jumps) > _JUMPS_AT_MOST:
        msg = f"{final.name} is behind more than {_JUMPS_AT_MOST} jump hosts"
        raise SpecError(msg, hint="check ~/.ssh/config for a ProxyJump that leads back to itself", field="jump")
    if not resolved.jumps:
        return [resolved]
    first, *others = (
        replace(hop, name=f"{hop.name}, the jump host of {final.name}", ssh_config=final.ssh_config)
        for hop in resolved.jumps
    )
    # As with `ssh`, only the first hop's own ProxyJump counts; the others are reached from the one before.
    return [
        *resolve_hops(first, final=final, depth=depth + 1),
        *(_resolve(hop, jumps=False) for hop in others),
        resolved,
    ]


@dataclass(frozen=True)
class ResolvedTarget:
    """A target as the configuration completes it."""

    target: Target
    host: str
    port: int
    user: str
    key_name: str
    jumps: tuple[Target, ...]
    identity_files: tuple[str, ...]
    identities_only: bool
    agent: str
    known_files: tuple[Path, ...]
    config: tuple[str, ...]
    ciphers: str | None

    @property
    def address(self) -> str:
        """Host and port, for errors."""
        return f"{self.host}:{self.port}"

    @property
    def entry(self) -> str:
        """Its name in known_hosts."""
        return host_keys.entry(self.key_name, self.port)


def command(target: Target) -> list[str] | None:
    """Return the command that connects to the target.

    None where there is none: no such program, or a pinned fingerprint, which it cannot compare.

    Raises:
        SpecError: the SSH configuration cannot be read.
    """
    program = shutil.which("ssh")
    resolved = resolve_hops(target, final=target)[-1]
    if program is None or target.fingerprint:
        return None
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "UserKnownHostsFile": " ".join(f'"{file}"' for file in resolved.known_files),
        "ConnectTimeout": str(_CONNECT_S),
        "ServerAliveInterval": str(_KEEPALIVE_S),
        "ServerAliveCountMax": str(_KEEPALIVES_MISSED),
        "ControlMaster": "no",  # a connection that is shared is one stream of ciphers
        "ControlPath": "none",
        "LogLevel": "ERROR",
        **({} if resolved.ciphers else {"Ciphers": _CIPHERS}),
        **({"ProxyJump": ",".join(target.jump)} if target.jump else {}),
    }
    words = [program, "-F", *(resolved.config or ("none",)), "-p", str(resolved.port)]
    for name, value in options.items():
        words += ["-o", f"{name}={value}"]
    for key in _keys(resolved):
        words += ["-i", key]
    return [*words, "-l", resolved.user, "--", target.alias]


def _keys(resolved: ResolvedTarget) -> list[str]:
    """Return the keys that `ssh` would not find: it searches the account's home, whatever HOME is."""
    named = [str(Path(resolved.target.key).expanduser())] if resolved.target.key else []
    usual = (Path("~/.ssh").expanduser() / name for name in _KEYS)
    return named or ([] if resolved.identity_files else [str(path) for path in usual if path.exists()])


def _resolve(target: Target, *, jumps: bool = True) -> ResolvedTarget:
    """Complete a target from the person's configuration. Reads files, connects to nothing."""
    path = target.ssh_config or Path("~/.ssh/config").expanduser()
    config = (str(path),) if target.ssh_config or os.access(path, os.R_OK) else ()
    try:
        # Without keys: they are gathered apart, because here a missing or encrypted one would be an error.
        options = asyncssh.SSHClientConnectionOptions(
            host=target.alias,
            port=target.port if target.port is not None else (),
            username=target.user or (),
            config=list(config),
            client_keys=None,
            encryption_algs=(),
        )
    except (ValueError, OSError, asyncssh.Error) as error:
        msg = f"the SSH configuration for {target.name} cannot be used: {error}"
        raise SpecError(msg, hint=f"try: ssh -G {target.alias}", where=str(path)) from None
    chosen = options.config
    ways = target.jump or tuple(str(chosen.get("ProxyJump") or "").split(",") if jumps else ())
    configured = [*_strings(chosen.get("UserKnownHostsFile")), *_strings(chosen.get("GlobalKnownHostsFile"))]
    return ResolvedTarget(
        target=target,
        host=options.host,
        port=options.port,
        user=options.username,
        key_name=options.host_key_alias or options.host,
        jumps=tuple(_parse_hop(way, target) for way in ways if way not in {"", "none"}) if jumps else (),
        identity_files=tuple(_strings(chosen.get("IdentityFile"))),
        identities_only=bool(chosen.get("IdentitiesOnly")),
        agent=agent_socket(chosen.get("IdentityAgent")),
        known_files=tuple(host_keys.files_for(target, configured)),
        config=config,
        ciphers=str(chosen.get("Ciphers")) if chosen.get("Ciphers") else None,
    )


def _strings(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def _parse_hop(text: str, behind: Target) -> Target:
    match = _HOP.fullmatch(text.strip())
    if match is None:
        msg = f"{text!r} is not a jump host (for {behind.name})"
        raise SpecError(msg, hint="write host, user@host or user@host:port", field="jump")
    host = match["six"] or match["host"]
    port = int(match["port"]) if match["port"] else None
    return Target(
        name=host,
        host=host,
        port=port,
        user=match["user"] or "",
        ssh_config=behind.ssh_config,
        known_hosts=behind.known_hosts,
    )
