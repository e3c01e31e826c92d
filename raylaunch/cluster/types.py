"""What the verbs of a backend take and give: steps, plans, reports, and the way to the controller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from raylaunch.models.safe_text import clean_lines, one_line


def _listed(head: str, entries: Iterable[str]) -> str:
    """Return entries below a line. They may have words of hosts in them: further lines of one are indented."""
    return "\n".join([one_line(head), *(clean_lines(entry, indent="      ") for entry in entries)])


@dataclass(frozen=True)
class Step:
    """One named step of ``up``, when it begins, when it is done, and when it had nothing to do."""

    name: str
    """Of hosts over SSH it begins with the host's, as ``dgx-1: ray``."""
    state: Literal["begins", "waits", "done", "kept", "note"]
    """``kept``: there was nothing to do. ``note``: what a person should know."""
    message: str
    seconds: float = 0.0
    """What it took, or has taken so far."""

    def __str__(self) -> str:
        took = f" ({self.seconds:.1f} s)" if self.state == "done" else ""
        return f"{self.name}: {self.message}{took}"


@dataclass(frozen=True)
class Plan:
    """What ``up`` would do now. It prints itself."""

    cluster: str
    actions: tuple[str, ...]
    """In order; empty when there is nothing to do."""
    keeps: tuple[str, ...] = ()
    """What runs already and stays as it is."""
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Why ``up`` would fail, host by host; empty when it would not, as far as can be seen before."""
    offers: Mapping[str, float] = field(default_factory=dict)
    """The most ``gpus`` and ``cpus`` that a job could ask for, as far as they are known before."""

    def __str__(self) -> str:
        would = "would start" if self.actions else "nothing to do, it is up"
        head = f"cluster {self.cluster}: {'up would fail' if self.problems else would}"
        lines = [f"  x {one}" for one in self.problems]
        lines += [*(f"  + {one}" for one in self.actions), *(f"  = {one}" for one in self.keeps)]
        return _listed(head, [*lines, *(f"  ! {one}" for one in self.notes)])


IF_UNKNOWN = "if it runs already, raylaunch up finds it there, and it is used from here too"
"""What is to be done about a cluster that another machine of the same account may have brought up."""


@dataclass(frozen=True)
class Ended:
    """One process that ``down`` ended, and how."""

    what: str
    """A process, or a host's part of the cluster."""
    pid: int = 0
    how: str = ""
    """By which signal, or what else became of it."""

    def __str__(self) -> str:
        return f"{self.what} (pid {self.pid}): {self.how}" if self.pid else self.what


@dataclass(frozen=True)
class DownReport:
    """What ``down`` ended. It is returned only when nothing of the cluster is left."""

    cluster: str
    ended: tuple[Ended, ...]
    store: str
    """Where jobs, logs and outputs stay."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    unknown: bool = False
    """Whether this machine knows nothing of the cluster: whether it runs was not looked at."""

    @property
    def was_running(self) -> bool:
        """Whether there was anything to end."""
        return bool(self.ended)

    def __str__(self) -> str:
        stays = f"; jobs, logs and outputs stay in {self.store}" if self.store else ""
        if self.unknown:
            return f"nothing was ended: this machine knows nothing of cluster {self.cluster}; {IF_UNKNOWN}"
        if not self.ended:
            return one_line(f"cluster {self.cluster} was not running{stays}")
        lines = [*(f"  {one}" for one in self.ended), *(f"  ! {one}" for one in self.notes)]
        return _listed(f"cluster {self.cluster} is down{stays}", lines)


@dataclass(frozen=True)
class Reach:
    """How to reach the controller from here."""

    url: str
    token: str = field(repr=False)
    dashboard_url: str = ""
    """Where Ray's dashboard and Jobs API are reached from here; empty where that is the controller's own address."""
    gcs_address: str = ""
    """The same of Ray's head; empty where the tunnel does not lead there, as is usual."""
    ray_tls: Mapping[str, str] = field(default_factory=dict)
    """Ray's variables for TLS with this machine's certificate; empty where it has none."""
    over_ssh: bool = False
    """Whether the way is a tunnel to the head."""
