"""What the HTTP API stands on: the stores and readers of this folder, and the verbs that change jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import anyio

from raylaunch.cluster_state import ControllerStatus, EnvironmentWheels, RayAccess
from raylaunch.controller.artifacts import Artifacts
from raylaunch.controller.auth import Role, TokenBook
from raylaunch.controller.foreign_logs import ForeignLogs
from raylaunch.controller.host_verbs import HostVerbs
from raylaunch.controller.invitations import Invitations
from raylaunch.controller.packages import PackageStore
from raylaunch.controller.record import JobRecord
from raylaunch.controller.records import Records
from raylaunch.controller.secret_store import SecretStore
from raylaunch.controller.settings import Settings
from raylaunch.state import AttemptView, DryRun, JobView, MetricsPage, NodeUsage, Progress, SubmitAnswer, SubmitRequest

_SEARCHES = 4


class MetricsReader(Protocol):
    """Metrics of a job. Called from worker threads."""

    def page(self, record: JobRecord, *, keys: Sequence[str], max_points: int) -> MetricsPage:
        """Return keys, last values and, for `keys`, at most `max_points` points each."""

    def last(self, job_id: str, attempts: Sequence[AttemptView]) -> tuple[dict[str, float], float | None]:
        """Return the last value of each metric, and the step reached."""

    def progress(self, job_id: str, attempts: Sequence[AttemptView]) -> Progress | None:
        """Return how far the training said it is, or None when it never did."""

    def csv(self, record: JobRecord, *, keys: Sequence[str]) -> Iterator[str]:
        """Yield ``step,at,key,value`` lines, a header first."""


class JobVerbs(Protocol):
    """What changes jobs. Called on the event loop."""

    async def submit(self, request: SubmitRequest, person: str) -> SubmitAnswer:
        """Take a job in, or return the one that the same request id made."""

    async def dry_run(self, request: SubmitRequest, person: str) -> DryRun:
        """Say where the job could run, without taking it in."""

    async def keep_wheels(self, given: EnvironmentWheels) -> None:
        """Keep the wheels of the cluster's own environment."""

    async def stop(self, record: JobRecord, *, grace_s: float | None, person: str) -> JobView:
        """Ask the job to stop, with `grace_s` seconds before SIGKILL (None: the job's own)."""

    async def remove(self, record: JobRecord) -> int:
        """Delete an ended job with all its files and return the bytes it took."""

    async def status(self, person: str, role: str) -> ControllerStatus:
        """Say how the controller, Ray and the nodes are."""

    def explained(self, view: JobView) -> JobView:
        """Return a job that waits with what it waits for now, and any other as it is."""

    async def wait_growth(self, attempt_id: str, timeout_s: float) -> None:
        """Return when a file of the attempt has grown in the store, or the time is over."""

    async def bring_left(self, record: JobRecord, name: str) -> None:
        """Bring an output that was not kept, one of `Artifacts.left`, from its node."""

    async def node_usage(self) -> tuple[NodeUsage, ...]:
        """Return what raylaunch takes on the nodes' disks, apart from the store."""

    def ray_access(self) -> RayAccess:
        """Return what Ray's own tools need."""


@dataclass(frozen=True)
class Services:
    """All that `raylaunch.controller.app.create_app` needs."""

    settings: Settings
    store: Path
    records: Records
    packages: PackageStore
    secrets: SecretStore
    tokens: TokenBook
    invitations: Invitations
    artifacts: Artifacts
    metrics: MetricsReader
    jobs: JobVerbs
    hosts: HostVerbs
    foreign_logs: ForeignLogs
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server shuts down: everything that waits for news then answers at once."""
    searches: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(_SEARCHES))
    """Searches have threads of their own: they may take long, and nothing else waits for them."""


__all__ = ["DryRun", "JobVerbs", "MetricsReader", "Role", "Services"]
