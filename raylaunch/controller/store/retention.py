"""What the store keeps how long: a pure plan, and its doing, once an hour. Without a setting nothing of a job goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.audit import AuditLog
from raylaunch.controller.store.database import RetentionRow
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.packages import ClusterWheels, PackageStore
from raylaunch.controller.store.recovery import empty_trash
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.errors import NotFoundError, RaylaunchError
from raylaunch.models.fields import Retention


class JobRemoval:
    """Removes jobs that have ended, with all that the store has of them. Who asked for it writes the audit log."""

    def __init__(self, *, records: Records, artifacts: Artifacts, secrets: SecretStore) -> None:
        self._records = records
        self._artifacts = artifacts
        self._secrets = secrets

    async def remove(self, job_id: str) -> int:
        """Delete its record and its secrets, and put its files into the trash; return the bytes that they take.

        Raises:
            ConflictError: it has not ended.
            NotFoundError: there is no such job.
            StorageError: it cannot be written; the job is still there then.
        """
        freed = await asyncio.to_thread(self._artifacts.bytes_of, job_id)
        self._records.delete(job_id)
        self._secrets.forget_job(job_id)
        return freed


_log = logging.getLogger(__name__)

EVERY_S = 3600.0
_FIRST_S = 60.0
PACKAGE_S = 24 * 3600.0
"""How long code stays that no job came with: its submission may still be on the way."""
_BY = "retention"


@dataclass(frozen=True)
class Expired:
    """What has outlived its time."""

    jobs: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    """Jobs whose checkpoints go; all else of them stays."""
    packages: tuple[str, ...] = ()


def plan_sweep(
    jobs: Iterable[RetentionRow],
    retention: Retention,
    packages: Mapping[str, float],
    *,
    now: float,
    also: AbstractSet[str] = frozenset(),
) -> Expired:
    """Compute what goes. Pure.

    Args:
        jobs: all jobs of the store.
        retention: the cluster's setting.
        packages: packages of code and wheels, with the time since which each is here.
        now: seconds since the epoch.
        also: packages that stay whatever jobs need.
    """
    ended = [(job, now - job.ended_at) for job in jobs if job.ended_at is not None]
    old = tuple(job.id for job, age in ended if retention.jobs_s is not None and age > retention.jobs_s)
    spent = tuple(
        job.id
        for job, age in ended
        if retention.checkpoints_s is not None and age > retention.checkpoints_s and job.id not in old
    )
    needed = {name for job in jobs if job.id not in old for name in job.packages} | also
    unused = tuple(name for name, since in packages.items() if name not in needed and now - since > PACKAGE_S)
    return Expired(old, spent, unused)


class RetentionLoop:
    """Does it, as long as the controller runs.

    Args:
        store: the store's folder.
        retention: the cluster's setting.
    """

    def __init__(  # noqa: PLR0913 -- the stores that it sweeps, all named
        self,
        store: Path,
        retention: Retention,
        *,
        records: Records,
        artifacts: Artifacts,
        packages: PackageStore,
        removal: JobRemoval,
        cluster_wheels: ClusterWheels,
    ) -> None:
        self._store = store
        self._retention = retention
        self._records = records
        self._artifacts = artifacts
        self._packages = packages
        self._removal = removal
        self._cluster_wheels = cluster_wheels
        self._audit = AuditLog(store)
        self._spent: set[str] = set()

    async def run(self) -> None:
        """Sweep now and then, until cancelled."""
        await asyncio.sleep(_FIRST_S)
        while True:
            try:
                await self.sweep()
            except RaylaunchError as error:
                _log.warning("what is over could not be removed, and is tried again: %s", error.message)
            except Exception:  # noqa: BLE001 -- the top of a task: what fails once is tried an hour later
                _log.exception("retention failed; it is tried again")
            await asyncio.sleep(EVERY_S)

    async def sweep(self) -> Expired:
        """Remove what has outlived its time, and return what that was."""
        found = await asyncio.to_thread(self._plan)
        for job in found.jobs:
            with contextlib.suppress(NotFoundError):  # a person was faster
                await self._removal.remove(job)
                self._audit.write(person=_BY, verb="remove", job=job, status=200)
        for job in found.checkpoints:
            if job not in self._spent and await asyncio.to_thread(self._drop_checkpoints, job):
                self._audit.write(person=_BY, verb="remove checkpoints", job=job, status=200)
            self._spent.add(job)
        for name in found.packages:
            await asyncio.to_thread(self._packages.remove, name)
        if found.jobs:
            await asyncio.to_thread(empty_trash, self._store)
        return found

    def _plan(self) -> Expired:
        packages = {name: self._packages.path(name).stat().st_mtime for name in self._packages.names()}
        also = self._cluster_wheels.packages
        return plan_sweep(self._records.retention_rows(), self._retention, packages, now=time.time(), also=also)

    def _drop_checkpoints(self, job: str) -> bool:
        folders = list((self._store / "jobs" / job).glob("attempt-*/checkpoints"))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if folders:
            self._artifacts.finalize(job)
        return bool(folders)
