"""Removing jobs: on request, and hourly by the retention settings (a pure plan). By default all jobs are kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.audit import AuditLog
from raylaunch.controller.store.database import RetentionRow
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.packages import ClusterWheels, PackageStore
from raylaunch.controller.store.recovery import empty_trash
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.errors import NotFoundError, RaylaunchError
from raylaunch.models.fields import Retention

_log = logging.getLogger(__name__)
EVERY_S = 3600.0
_FIRST_S = 60.0
PACKAGE_S = 24 * 3600.0
"""How long an unused package is kept: the submission of its job may still be on the way."""
_BY = "retention"


class JobRemoval:
    """Removes ended jobs with all their files. The caller writes the audit log."""

    def __init__(self, *, records: Records, artifacts: Artifacts, secrets: SecretStore) -> None:
        self._records = records
        self._artifacts = artifacts
        self._secrets = secrets

    async def remove(self, job_id: str) -> int:
        """Delete a job's record and secrets, and move its files to the trash; return their size in bytes.

        Raises:
            ConflictError: it has not ended.
            NotFoundError: there is no such job.
            StorageError: it cannot be written; the job still exists then.
        """
        freed = await asyncio.to_thread(self._artifacts.bytes_of, job_id)
        self._records.delete(job_id)
        self._secrets.forget_job(job_id)
        return freed


@dataclass(frozen=True)
class Expired:
    """What has expired."""

    jobs: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    """Jobs whose checkpoints are removed, and nothing else."""
    packages: tuple[str, ...] = ()


def plan_sweep(
    jobs: Iterable[RetentionRow],
    retention: Retention,
    packages: Mapping[str, float],
    *,
    now: float,
    also: AbstractSet[str] = frozenset(),
) -> Expired:
    """Return what has expired. Pure.

    Args:
        jobs: all jobs of the store.
        retention: the cluster's setting.
        packages: packages of code and wheels, with the time at which each was stored.
        now: seconds since the epoch.
        also: packages to keep in addition.
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
    """Removes what has expired, as long as the controller is running.

    Args:
        retention: the cluster's setting.
    """

    def __init__(  # noqa: PLR0913 -- the stores that it cleans, all named
        self,
        retention: Retention,
        *,
        records: Records,
        artifacts: Artifacts,
        packages: PackageStore,
        removal: JobRemoval,
        cluster_wheels: ClusterWheels,
    ) -> None:
        self._retention = retention
        self._records = records
        self._artifacts = artifacts
        self._packages = packages
        self._removal = removal
        self._cluster_wheels = cluster_wheels
        self._audit = AuditLog(records.store)
        self._without_checkpoints: set[str] = set()

    async def run(self) -> None:
        """Sweep every hour, until cancelled."""
        await asyncio.sleep(_FIRST_S)
        while True:
            try:
                await self.sweep()
            except RaylaunchError as error:
                _log.warning("expired data could not be removed; retrying later: %s", error.message)
            except Exception:  # noqa: BLE001 -- the top of a task: it is retried an hour later
                _log.exception("retention failed; retrying later")
            await asyncio.sleep(EVERY_S)

    async def sweep(self) -> Expired:
        """Remove what has expired, and return it."""
        found = await asyncio.to_thread(self._plan)
        for job in found.jobs:
            with contextlib.suppress(NotFoundError):  # a person has removed it meanwhile
                await self._removal.remove(job)
                self._audit.write(person=_BY, verb="remove", job=job, status=200)
        for job in found.checkpoints:
            if job not in self._without_checkpoints and await asyncio.to_thread(self._drop_checkpoints, job):
                self._audit.write(person=_BY, verb="remove checkpoints", job=job, status=200)
            self._without_checkpoints.add(job)
        for name in found.packages:
            await asyncio.to_thread(self._packages.remove, name)
        if found.jobs:
            await asyncio.to_thread(empty_trash, self._records.store)
        return found

    def _plan(self) -> Expired:
        packages = {name: self._packages.path(name).stat().st_mtime for name in self._packages.names()}
        also = self._cluster_wheels.packages
        return plan_sweep(self._records.retention_rows(), self._retention, packages, now=time.time(), also=also)

    def _drop_checkpoints(self, job: str) -> bool:
        folders = list(self._records.folder(job).glob("attempt-*/checkpoints"))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if folders:
            self._artifacts.finalize(job)
        return bool(folders)
