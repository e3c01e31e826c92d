"""The one way in which a job of ours is removed, whether a person asks for it or its time is over."""

from __future__ import annotations

import asyncio

from raylaunch.controller.artifacts import Artifacts
from raylaunch.controller.records import Records
from raylaunch.controller.secret_store import SecretStore


class Removal:
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
