"""Arguments and results of a backend: steps, plans, reports, and the controller's URL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from raylaunch.models.safe_text import clean_lines, one_line


def _listed(head: str, entries: Iterable[str]) -> str:
    """Return entries below a line. They may contain output of hosts: further lines of an entry are indented."""
    return "\n".join([one_line(head), *(clean_lines(entry, indent="      ") for entry in entries)])


@dataclass(frozen=True)
class Step:
    """One named step of ``up``: reported when it starts, when it is done, and when there was nothing to do."""

    name: str
    """For hosts over SSH it starts with the host's name, for example ``dgx-1: ray``."""
    state: Literal["begins", "waits", "done", "kept", "note"]
    """``kept``: there was nothing to do. ``note``: what a person should know."""
    message: str
    seconds: float = 0.0
    """How long it took, or has taken so far."""

    def __str__(self) -> str:
        took = f" ({self.seconds:.1f} s)" if self.state == "done" else ""
        return f"{self.name}: {self.message}{took}"


@dataclass(frozen=True)
class Plan:
    """What ``up`` would do now; ``str()`` formats it for people."""

    cluster: str
    actions: tuple[str, ...]
    """In order; empty if there is nothing to do."""
    keeps: tuple[str, ...] = ()
    """Parts that are running and stay as they are."""
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Why ``up`` would fail, by host; empty if no reason is known before."""
    offers: Mapping[str, float] = field(default_factory=dict)
    """The most ``gpus`` and ``cpus`` that a job could request, as far as they are known before."""

    def __str__(self) -> str:
        would = "would start" if self.actions else "nothing to do, it is up"
        head = f"cluster {self.cluster}: {'up would fail' if self.problems else would}"
        lines = [f"  x {one}" for one in self.problems]
        lines += [*(f"  + {one}" for one in self.actions), *(f"  = {one}" for one in self.keeps)]
        return _listed(head, [*lines, *(f"  ! {one}" for one in self.notes)])


IF_UNKNOWN = "if it is already running, raylaunch up connects to it"
"""The advice about a cluster that another machine of the same account may have started."""


@dataclass(frozen=True)
class Ended:
    """One process that ``down`` ended, and how."""

    what: str
    """A process, or a host's part of the cluster."""
    pid: int = 0
    how: str = ""
    """By which signal, or how else."""

    def __str__(self) -> str:
        return f"{self.what} (pid {self.pid}): {self.how}" if self.pid else self.what


@dataclass(frozen=True)
class DownReport:
    """What ``down`` ended. It is returned only if no process of the cluster is left."""

    cluster: str
    ended: tuple[Ended, ...]
    store: str
    """Where jobs, logs and outputs stay."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    unknown: bool = False
    """Whether the cluster was not started from this machine, so that nothing was checked."""

    @property
    def was_running(self) -> bool:
        """Whether there was anything to end."""
        return bool(self.ended)

    def __str__(self) -> str:
        stays = f"; jobs, logs and outputs stay in {self.store}" if self.store else ""
        if self.unknown:
            return f"nothing was ended: cluster {self.cluster} was not started from this machine; {IF_UNKNOWN}"
        if not self.ended:
            return one_line(f"cluster {self.cluster} was not running{stays}")
        lines = [*(f"  {one}" for one in self.ended), *(f"  ! {one}" for one in self.notes)]
        return _listed(f"cluster {self.cluster} is down{stays}", lines)


@dataclass(frozen=True)
class Endpoint:
    """The URL and token of the controller, as reached from here."""

    url: str
    token: str = field(repr=False)
    dashboard_url: str = ""
    """The URL of Ray's dashboard and Jobs API from here; empty if that is the controller's own address."""
    gcs_address: str = ""
    """The address of Ray's head from here; empty if the tunnel does not forward it, which is the default."""
    ray_tls: Mapping[str, str] = field(default_factory=dict)
    """Ray's variables for TLS with this machine's certificate; empty if it has none."""
    over_ssh: bool = False
    """Whether it goes through a tunnel to the head."""
