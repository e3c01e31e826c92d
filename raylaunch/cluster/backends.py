"""The seam: where a cluster lives. Each verb may be repeated, and touches only what is ours."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from raylaunch.cluster.plan import DownReport, Ended, Plan, Reach, Step
from raylaunch.cluster.ssh.target import OnPrompt
from raylaunch.cluster_state import ClusterStatus
from raylaunch.spec import ClusterSpec

__all__ = ["Backend", "DownReport", "Ended", "Plan", "Reach", "Step", "backend_for", "explain_silence", "is_joined"]


class Backend(Protocol):
    """A place where clusters live."""

    async def plan(self, spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> Plan:
        """Say what `up` would do now, and change nothing."""
        ...

    async def up(
        self, spec: ClusterSpec, /, *, on_step: Callable[[Step], None], on_prompt: OnPrompt | None = None
    ) -> ClusterStatus:
        """Bring the cluster up, starting only what does not run, and return when it can take jobs.

        `on_prompt` asks a person, where one is there, what only a person can say.
        """
        ...

    async def down(self, spec: ClusterSpec | str, /, *, on_prompt: OnPrompt | None = None) -> DownReport:
        """End exactly what `up` started, and return when nothing of it is left."""
        ...

    async def reach(self, spec: ClusterSpec | str, /) -> Reach:
        """Return the controller's URL and token, as they are reached from here."""
        ...

    async def status(self, spec: ClusterSpec | str, /) -> ClusterStatus:
        """Look at the cluster, and change nothing."""
        ...


_TOLD_LATE, _PAUSE_S = 5, 0.1
"""A tunnel says why it is down a little after its connections are."""


def is_joined(name: str) -> bool:
    """Whether somebody else runs the cluster of this name, and this machine has joined it. Reads one small file."""
    home = Path(os.environ.get("RAYLAUNCH_HOME") or "~/.raylaunch").expanduser()
    try:
        found = json.loads((home / "clusters" / name / "client.json").read_bytes())
    except (OSError, ValueError):
        return False
    return bool(isinstance(found, dict) and found.get("owner"))


async def explain_silence(name: str) -> tuple[str, str]:
    """Return why a cluster on other machines does not answer here, as its tunnel says, and what to do; or nothing."""
    from raylaunch.cluster import client_record, home  # noqa: PLC0415 -- only where something is wrong

    paths = home.cluster_paths(name)
    record = client_record.load_client(paths)
    if record is None:
        return "", ""
    for _ in range(_TOLD_LATE):
        tunnel = client_record.load_tunnel(paths)
        if tunnel is not None and tunnel.alive and tunnel.why:
            return tunnel.why, tunnel.hint
        await asyncio.sleep(_PAUSE_S)
    if not record.joined:
        return "", ""
    port = record.head_ports["controller"]
    hint = (
        f"ask {record.owner}, who runs it: raylaunch up; if it is at another port than {port} there now, for a new line"
    )
    return "", f"{hint}: raylaunch token create"


def backend_for(spec: ClusterSpec) -> Backend:
    """Return the backend that the spec's `kind` names."""
    match spec.kind:
        case "local":
            from raylaunch.cluster import embedded  # noqa: PLC0415 -- one backend is loaded, the one that is used

            return embedded
        case "ssh":
            from raylaunch.cluster import ssh_backend  # noqa: PLC0415 -- as above

            return ssh_backend
        case "existing":
            from raylaunch.cluster import existing  # noqa: PLC0415 -- as above

            return existing
