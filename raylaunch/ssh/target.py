"""A host: how it is reached over SSH, and what a person may be asked meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anyio

from raylaunch.paths import raylaunch_home

_REPORT_S = 5.0


@dataclass(frozen=True)
class Target:
    """One host as a spec names it. What is left empty comes from ``~/.ssh/config``, as with `ssh`.

    `name` is the person's name for it, used in errors. `host` is what is looked up in the configuration and resolved:
    an alias, a name or an address; by default `name`. `jump` is a chain of ``[user@]host[:port]``, nearest first; with
    ``("none",)`` a ProxyJump of the configuration does not count. `fingerprint` (``SHA256:…``) pins the host key: then
    no other is accepted, nor this one where known_hosts has another key of the host or revokes it. `known_hosts`
    replaces the person's files and raylaunch's own.
    """

    name: str
    host: str = ""
    port: int | None = None
    user: str = ""
    key: str = ""
    jump: tuple[str, ...] = ()
    fingerprint: str = ""
    ssh_config: Path | None = None
    known_hosts: Path | None = None

    @property
    def alias(self) -> str:
        """What is looked up in the configuration."""
        return self.host or self.name


@dataclass(frozen=True)
class Prompt:
    """A question to a person. `text` is complete as it stands.

    The answer to ``host_key`` and ``trust`` is ``yes``, or anything else. `host` is the cluster's name for ``trust``,
    `path` is the key file that a passphrase is for, `fingerprint` the host key's.
    """

    kind: Literal["passphrase", "host_key", "trust"]
    host: str
    text: str
    path: str = ""
    fingerprint: str = ""


OnPrompt = Callable[[Prompt], Awaitable["str | None"]]
"""Asks a person; None is no answer. Without it no question is asked, and the error has the command to type."""


@dataclass(frozen=True)
class PendingStep:
    """Something on a host that has not ended yet. Its text is a line to show."""

    host: str
    step: str
    waited_s: float
    limit_s: float

    def __str__(self) -> str:
        return f"{self.host}: {self.step}: {self.waited_s:.0f} s so far, at most {self.limit_s:.0f} s"


OnWait = Callable[[PendingStep], None]
"""Called every few seconds while something has not ended yet."""


@contextmanager
def reporting_wait(on_wait: OnWait | None, host: str, step: str, limit_s: float) -> Iterator[None]:
    """Call `on_wait` every five seconds until this has ended."""
    if on_wait is None:
        yield
        return
    task = asyncio.ensure_future(_report_wait(on_wait, host, step, limit_s))
    try:
        yield
    finally:
        task.cancel()


async def _report_wait(on_wait: OnWait, host: str, step: str, limit_s: float) -> None:
    started = time.monotonic()
    while True:
        await anyio.sleep(_REPORT_S)
        on_wait(PendingStep(host, step, time.monotonic() - started, limit_s))


def own_known_hosts() -> Path:
    """Return raylaunch's own known_hosts: keys that a person accepted here. The person's own file is only read."""
    return raylaunch_home() / "known_hosts"
