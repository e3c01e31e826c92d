"""Outputs that were not kept: they stay on their node for some days, and are brought when asked for.

What looks like a secret is brought for the job's owner alone, and apart from the files that others may read.
"""

from __future__ import annotations

import asyncio
import functools

from raylaunch.controller.artifacts import Artifacts
from raylaunch.controller.link import Link
from raylaunch.controller.records import JobRecord
from raylaunch.controller.sight import Sight
from raylaunch.errors import NotFoundError
from raylaunch.runner.contract import OUTPUTS, WITHHELD


class LeftOutputs:
    """Brings them into the store, each once however many ask."""

    def __init__(self, *, link: Link, sight: Sight, artifacts: Artifacts) -> None:
        self._link = link
        self._sight = sight
        self._artifacts = artifacts
        self._coming: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def bring(self, record: JobRecord, name: str) -> None:
        """Bring a file, if it is not here.

        Args:
            record: the job.
            name: one of `raylaunch.controller.artifacts.Left.sizes`.

        Raises:
            NotFoundError: its node has left the cluster, or does not have it any more.
            ClusterError: its node does not answer.
        """
        left = await asyncio.to_thread(self._artifacts.left, record.id)
        below = WITHHELD if name in left.withheld else OUTPUTS
        key = (f"{record.id}-{left.n}", name)
        if key not in self._coming:
            self._coming[key] = asyncio.create_task(self._bring(record, left.n, name, below))
            self._coming[key].add_done_callback(functools.partial(self._came, key))
        await asyncio.shield(self._coming[key])

    async def _bring(self, record: JobRecord, n: int, name: str, below: str) -> None:
        attempt = next((attempt for attempt in record.attempts if attempt.n == n), None)
        node_id = self._sight.node_of(attempt) if attempt is not None else ""
        if attempt is None or not node_id:
            msg = f"{name} was not kept, and {attempt.node if attempt else 'its node'} is not in the cluster"
            raise NotFoundError(msg, hint="it can be fetched within 7 days, once the node is back")
        await self._link.bring_left(node_id, attempt.id, name, below=below)
        await asyncio.to_thread(self._artifacts.seal, record.id)

    def _came(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        self._coming.pop(key, None)
        if not task.cancelled():
            task.exception()  # each that waits has raised it
