"""The seam: where a cluster lives. Each verb may be repeated, and touches only what is ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from raylaunch.cluster.plan import DownReport, Ended, Plan, Reach, Step
from raylaunch.cluster.ssh_target import OnPrompt
from raylaunch.spec import ClusterSpec
from raylaunch.state import ClusterStatus

__all__ = ["Backend", "DownReport", "Ended", "Plan", "Reach", "Step", "backend_for"]


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
