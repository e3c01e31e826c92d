"""From a target to an open, trusted connection: configuration, jump hosts, host keys, keys."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import anyio
import asyncssh

from raylaunch.errors import HostError, HostKeyError, HostUnreachableError
from raylaunch.ssh import host_keys
from raylaunch.ssh.identities import Identities, agent_keys, identities, refused_error, unlock
from raylaunch.ssh.resolve import ResolvedTarget, resolve_hops
from raylaunch.ssh.target import OnPrompt, OnWait, Prompt, Target, own_known_hosts, reporting_wait

_FAST_CIPHERS = "aes128-gcm@openssh.com,aes256-gcm@openssh.com"
_KEEPALIVE_S = 5
_KEEPALIVES_MISSED = 3
_CLOSE_S = 3
_PAUSES_S = (0.2, 0.6, 1.5)
_CLOSED_EARLY = "closed the connection before the log-in"
_CLOSED = (
    "is sshd listening on that port? Check its log on the host (journalctl -u ssh); it may have too many connections "
    "(MaxStartups), or refuse this address"
)
_JUMP = "check the name and port as the jump host sees them; on it: ssh or nc -vz"
_OLD = "update its sshd, or this client"
_SILENT = "is it on, and on this network or VPN? A firewall that drops packets looks the same"
_REVOKED = "the key is marked @revoked in known_hosts, or its certificate is not valid for this name or any more"
_TOO_MANY = "it allows fewer keys than were offered; name the right one, for example  key: ~/.ssh/id_ed25519"


class _NotTrusted(Exception):  # noqa: N818 -- a turn on the way, never seen outside
    """The host showed a key that no file vouches for."""

    def __init__(self, key: asyncssh.SSHKey | None) -> None:
        super().__init__("host key")
        self.key = key


class _ClosedEarly(Exception):  # noqa: N818 -- as above
    """The host closed the connection before its first word."""


class Route:
    """Open connections, one behind the other; `connection` is the last one."""

    def __init__(self, hops: list[asyncssh.SSHClientConnection]) -> None:
        self._hops = hops
        self.connection = hops[-1]

    async def close(self) -> None:
        """Close them all, the last first; what does not answer is dropped after some seconds."""
        for hop in reversed(self._hops):
            hop.close()
            with anyio.move_on_after(_CLOSE_S, shield=True):
                with suppress(OSError, asyncssh.Error):
                    await hop.wait_closed()
                continue
            hop.abort()


async def connect(target: Target, *, limit_s: float, on_prompt: OnPrompt | None, on_wait: OnWait | None) -> Route:
    """Connect to a host, through its jump hosts. Each hop may take `limit_s` seconds, besides a person's answers.

    Raises:
        HostUnreachableError: no connection can be made.
        HostKeyError: it shows a key that was not accepted.
        HostAuthError: it takes none of the keys.
        SpecError: ``~/.ssh/config`` or a known_hosts file cannot be read.
    """
    hops: list[asyncssh.SSHClientConnection] = []
    try:
        for resolved in resolve_hops(target, final=target):
            tunnel = hops[-1] if hops else None
            attempt = _Attempt(resolved, tunnel, _identities(resolved, target.key), limit_s, on_wait)
            hops.append(await _hop(attempt, on_prompt))
    except BaseException as error:
        if isinstance(error, HostError):
            error.host = target.name
        if hops:
            await Route(hops).close()
        raise
    return Route(hops)


@dataclass
class _Attempt:
    """What one attempt to connect depends on. `tried` names the keys that were offered in the last one."""

    resolved: ResolvedTarget
    tunnel: asyncssh.SSHClientConnection | None
    own_keys: Identities
    limit_s: float
    on_wait: OnWait | None
    tried: list[str] = field(default_factory=list)


def _identities(resolved: ResolvedTarget, final_key: str) -> Identities:
    extra = "" if final_key == resolved.target.key else final_key
    return identities(
        resolved.target, configured=resolved.identity_files, only_these=resolved.identities_only, extra=extra
    )


async def _hop(attempt: _Attempt, on_prompt: OnPrompt | None) -> asyncssh.SSHClientConnection:
    resolved, target = attempt.resolved, attempt.resolved.target
    while True:
        expected = host_keys.known(resolved.known_files, resolved.key_name, resolved.port)
        try:
            return await _connect_trusted(attempt, expected)
        except _NotTrusted as error:
            key = error.key or await _offered_key(attempt)
            if key in expected.keys:
                raise _unreachable(resolved, _CLOSED_EARLY, _CLOSED) from None
            if not expected.empty:
                raise host_keys.changed_error(target, key, resolved.address, resolved.entry, expected) from None
            async with _prompt_lock():
                if host_keys.known(resolved.known_files, resolved.key_name, resolved.port).empty:
                    await _confirm_host_key(resolved, key, on_prompt)
        except asyncssh.PermissionDenied as error:
            own_keys = attempt.own_keys
            async with _prompt_lock():
                opened = await unlock(own_keys.locked, target, on_prompt) if on_prompt else []
            if not opened:
                raise refused_error(target, resolved.user, attempt.tried, own_keys.locked, error.reason) from None
            attempt.own_keys = replace(own_keys, keys=(*own_keys.keys, *opened), locked=())


# A person is asked one question at a time, and none twice: of hosts that are connected to at once, many are behind one
# jump host, or use one key. A lock is of one event loop.
_LOCKS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()


def _prompt_lock() -> asyncio.Lock:
    return _LOCKS.setdefault(asyncio.get_running_loop(), asyncio.Lock())


async def _confirm_host_key(resolved: ResolvedTarget, key: asyncssh.SSHKey, on_prompt: OnPrompt | None) -> None:
    """Ask a person whether the key of an unknown host is right, and remember it if so."""
    target = resolved.target
    error = host_keys.unknown_error(target, key, resolved.address)
    if on_prompt is None:
        raise error
    text = f"{error.message}\nIs that its key? It will be remembered. [yes/no]: "
    answer = await on_prompt(Prompt("host_key", target.name, text, fingerprint=error.fingerprint))
    if (answer or "").strip().lower() not in {"yes", error.fingerprint.lower()}:
        raise error
    host_keys.accept(key, resolved.entry, target.known_hosts or own_known_hosts())


async def _connect_trusted(attempt: _Attempt, expected: host_keys.KnownKeys) -> asyncssh.SSHClientConnection:
    """Connect, if the host shows a key that is known or pinned."""
    target = attempt.resolved.target
    if not target.fingerprint:
        # No certificate where no authority is known: the plain key is what a person can compare.
        return await _connect_retry(attempt, expected, ",".join(host_keys.FAMILIES) if expected.empty else "")
    if expected.keys and target.fingerprint not in {key.get_fingerprint() for key in expected.keys}:
        await _check_known_too(attempt, expected)
    shown: asyncssh.SSHKey | None = None
    for family in host_keys.FAMILIES:
        try:
            return await _connect_retry(attempt, host_keys.KnownKeys(revoked=expected.revoked), family)
        except _NotTrusted as error:  # noqa: PERF203 -- three at most
            shown = shown or error.key
    if shown is None:
        raise _unreachable(attempt.resolved, _CLOSED_EARLY, _CLOSED)
    raise host_keys.pinned_error(target, shown, attempt.resolved.address)


async def _check_known_too(attempt: _Attempt, expected: host_keys.KnownKeys) -> None:
    """Check that a host whose pinned key is of another kind than the known one has that one as well."""
    try:
        connection = await _connect_retry(attempt, expected, "")
    except _NotTrusted:
        resolved = attempt.resolved
        raise host_keys.contradicted_error(resolved.target, resolved.address, resolved.entry, expected) from None
    connection.abort()


async def _offered_key(attempt: _Attempt) -> asyncssh.SSHKey:
    """Return the key that the host shows when it may show any."""
    try:
        connection = await _connect_retry(attempt, host_keys.KnownKeys(), ",".join(host_keys.FAMILIES))
    except _NotTrusted as error:
        if error.key is not None:
            return error.key
    else:
        connection.abort()  # never: nothing is known in that attempt
    raise _unreachable(attempt.resolved, _CLOSED_EARLY, _CLOSED)


async def _connect_retry(
    attempt: _Attempt, expected: host_keys.KnownKeys, algorithms: str
) -> asyncssh.SSHClientConnection:
    """Connect once; again where the host hung up before its first word: it was busy with others' log-ins.

    sshd does so when more than some ten connections are in that state (MaxStartups), as when sixteen hosts lie behind
    one jump host.
    """
    for pause_s in _PAUSES_S:
        try:
            return await _connect(attempt, expected, algorithms)
        except _ClosedEarly:  # noqa: PERF203 -- a few at most
            await anyio.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 -- so that not all come again at once
    try:
        return await _connect(attempt, expected, algorithms)
    except _ClosedEarly:
        raise _unreachable(attempt.resolved, _CLOSED_EARLY, _CLOSED) from None


async def _connect(attempt: _Attempt, expected: host_keys.KnownKeys, algorithms: str) -> asyncssh.SSHClientConnection:
    resolved, own_keys, target = attempt.resolved, attempt.own_keys, attempt.resolved.target
    watch = host_keys.HostKeyWatch("" if expected.keys else target.fingerprint)  # known keys count, not the pin
    waiting = reporting_wait(attempt.on_wait, target.name, "connect", attempt.limit_s)
    narrowed = bool(expected.keys or target.fingerprint)
    with (
        waiting,
        _translate_errors(resolved, attempt.limit_s, watch, narrowed=narrowed),
        anyio.fail_after(attempt.limit_s),
    ):
        async with agent_keys(resolved.agent, own_keys.only) as held:
            mine = {key.public_data for key in own_keys.keys}
            from_agent = [pair for pair in held if pair.public_data not in mine]
            attempt.tried = [*own_keys.names, *(f"{pair.get_comment()} (agent)" for pair in from_agent)]
            keys = [*own_keys.keys, *from_agent] if own_keys.first else [*from_agent, *own_keys.keys]
            return await asyncssh.connect(
                target.alias,
                target.port if target.port is not None else (),
                username=target.user or (),
                config=list(resolved.config),
                tunnel=attempt.tunnel,
                client_factory=lambda: watch,
                known_hosts=lambda _host, _address, _port: expected.as_asyncssh(),
                server_host_key_algs=algorithms or (),
                client_keys=keys or None,
                agent_path=None,
                agent_identities=None,
                encryption_algs=() if resolved.ciphers else f"^{_FAST_CIPHERS}",
                keepalive_interval=_KEEPALIVE_S,
                keepalive_count_max=_KEEPALIVES_MISSED,
                x509_trusted_certs=None,
                gss_kex=False,
                request_pty=False,
            )


@contextmanager
def _translate_errors(  # noqa: C901 -- a line for each fault
    resolved: ResolvedTarget, limit_s: float, watch: host_keys.HostKeyWatch, *, narrowed: bool
) -> Iterator[None]:
    """Translate failures of the connection into errors with advice.

    `narrowed`: the host was asked for certain kinds of keys only: one that has none of them closes the
    connection, without a word to us.
    """
    try:
        yield
    except asyncssh.PermissionDenied:
        raise
    except asyncssh.HostKeyNotVerifiable as error:
        if watch.shown is not None:
            raise _NotTrusted(watch.shown) from None
        msg = f"{resolved.target.name} ({resolved.address}): {error.reason}"  # revoked, or not valid
        raise HostKeyError(msg, hint=_REVOKED, host=resolved.target.name, step="host key") from None
    except asyncssh.KeyExchangeFailed as error:
        raise _unreachable(resolved, f"has no SSH algorithm in common with this client: {error.reason}", _OLD) from None
    except asyncssh.ChannelOpenError as error:
        raise _unreachable(resolved, f"cannot be reached from its jump host: {error.reason}", _JUMP) from None
    except (asyncssh.ConnectionLost, ConnectionResetError, BrokenPipeError):
        if not watch.spoke:
            raise _ClosedEarly from None
        if narrowed:
            raise _NotTrusted(None) from None
        raise _unreachable(resolved, _CLOSED_EARLY, _CLOSED) from None
    except asyncssh.DisconnectError as error:
        if "too many authentication failures" in error.reason.lower():
            raise asyncssh.PermissionDenied(_TOO_MANY) from None
        raise _unreachable(resolved, f"ended the connection before the log-in: {error.reason}", _CLOSED) from None
    except (TimeoutError, asyncio.TimeoutError):
        raise _unreachable(resolved, f"did not answer within {limit_s:g} s", _SILENT) from None
    except OSError as error:
        raise _unreachable(resolved, *_why(error, resolved)) from None


def _unreachable(resolved: ResolvedTarget, why: str, hint: str) -> HostUnreachableError:
    name = resolved.target.name
    return HostUnreachableError(f"{name} ({resolved.address}) {why}", hint=hint, host=name, step="connect")


def _why(error: OSError, resolved: ResolvedTarget) -> tuple[str, str]:
    """Say why no TCP connection could be made, and what to do. Several addresses give one error without a number."""
    text = str(error)
    if isinstance(error, socket.gaierror):
        hint = "check the spelling, /etc/hosts and your VPN; or give an address, or a HostName in ~/.ssh/config"
        return f"cannot be found: there is no address for the name {resolved.host}", hint
    if error.errno == errno.ECONNREFUSED or f"[Errno {errno.ECONNREFUSED}]" in text:
        return "refuses connections: nothing listens on that port", (
            f"is sshd running there, and on port {resolved.port}? On the host: systemctl status ssh"
        )
    unrouted = (errno.EHOSTUNREACH, errno.ENETUNREACH)
    if error.errno in unrouted or any(f"[Errno {number}]" in text for number in unrouted):
        return "cannot be reached: there is no route to it from here", "is it on, and are you on its network or VPN?"
    return f"cannot be reached: {error.strerror or text}", f"try: ssh -v {resolved.target.alias}"
