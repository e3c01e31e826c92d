"""The end of a cluster of hosts: its workers first, side by side, then its head."""

from __future__ import annotations

import anyio

from raylaunch.cluster import host_calls
from raylaunch.cluster.client_record import ClientRecord
from raylaunch.cluster.plan import Ended
from raylaunch.cluster.ssh.machine import machine
from raylaunch.cluster.ssh.target import OnPrompt
from raylaunch.cluster.targets import target_of
from raylaunch.errors import RaylaunchError


class TakeDown:
    """One taking down: what was ended, and what could not be.

    Args:
        record: what was brought up from here.
        on_prompt: asks a person; None where nobody is there.
    """

    def __init__(self, record: ClientRecord, *, on_prompt: OnPrompt | None = None) -> None:
        self._record = record
        self._prompt = on_prompt
        self.ended: list[Ended] = []
        self.notes: list[str] = []
        self.errors: dict[str, RaylaunchError] = {}
        """By host."""
        self.store = ""
        """On the head."""

    async def run(self) -> None:
        """End it on every host that was brought up; a host that fails does not stop the others."""
        async with anyio.create_task_group() as group:
            for name in self._record.hosts:
                if name != self._record.head:
                    group.start_soon(self._host, name)
        if self._record.head in self._record.hosts:
            await self._host(self._record.head)

    async def _host(self, name: str) -> None:
        worker = "" if name == self._record.head else name
        cluster = self._record.spec.name
        try:
            async with machine(target_of(self._record.hosts[name]), on_prompt=self._prompt) as connection:
                done = await host_calls.down(connection, self._record.programs[name], name=cluster, worker=worker)
        except RaylaunchError as error:
            self.errors[name] = error
            return
        self.ended += [Ended(f"{name}: {one}") for one in done.ended]
        self.notes += [f"{name}: {one}" for one in done.notes]
        if not worker:
            self.store = f"{name}:{done.store}"
