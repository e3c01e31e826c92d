"""Which cluster a notebook or script means, where it answers, and what heals it when it does not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from raylaunch.client import Client, Reachable
from raylaunch.cluster.backends import Step, backend_for
from raylaunch.config import load_cluster_spec
from raylaunch.errors import ClusterDownError
from raylaunch.spec import ClusterSpec

_KNOCK_S = 2.0

_log = logging.getLogger(__name__)

Notice = Callable[[str], None]
"""Told in a sentence what a person should know meanwhile."""


def say(sentence: str) -> None:
    """Log a notice. Python shows warnings on stderr where nobody has configured logging, as in a notebook."""
    _log.warning("%s", sentence)


def meant(name: str, cluster_file: Path | None) -> ClusterSpec:
    """Return the cluster that is meant: the file's, and where the file's is not `name`, the embedded one of that name.

    Raises:
        SpecError: the file cannot be read, or the name cannot be one.
    """
    spec = load_cluster_spec(cluster_file)
    return spec if not name or spec.name == name else ClusterSpec.model_validate({"name": name})


class Place:
    """Where one cluster lives.

    Args:
        spec: the cluster.
        on_notice: told what a person should know meanwhile.
    """

    def __init__(self, spec: ClusterSpec, on_notice: Notice) -> None:
        self._spec = spec
        self._backend = backend_for(spec)
        self._notice = on_notice

    async def client(self, *, start: bool) -> Client:
        """Return a client. A cluster that should run and does not is healed; with `start`, a missing one is started.

        Raises:
            ClusterDownError: there is no cluster, and `start` is False.
            ClusterStartError: a step of starting it failed.
        """
        reach = await self._reach(start=start)
        return Client(reach, cluster=self._spec.name, on_notice=self._notice, heal=self._heal)

    async def _reach(self, *, start: bool) -> Reachable:
        with contextlib.suppress(ClusterDownError):
            reach = await self._backend.reach(self._spec)
            if await _listens(reach):
                return reach
        if await self._should_run():
            self._notice(f"cluster {self._spec.name!r} should run, and its controller does not answer; healing it")
        elif start:
            self._notice(f"there is no cluster {self._spec.name!r} yet; starting it, which takes about 20 s")
        else:
            msg = f"there is no cluster {self._spec.name!r} here"
            raise ClusterDownError(msg, hint="start it: raylaunch up; or let Python do so: connect(start=True)")
        return await self._up()

    async def _up(self) -> Reachable:
        await self._backend.up(self._spec, on_step=_log_step)
        return await self._backend.reach(self._spec)

    async def _should_run(self) -> bool:
        """Return whether somebody wants this cluster to run: it was started, and not taken down."""
        if (await self._backend.status(self._spec)).state != "stopped":
            return True
        from raylaunch.cluster.home import cluster_paths  # noqa: PLC0415 -- only where something is wrong
        from raylaunch.cluster.record import load_record  # noqa: PLC0415

        record = load_record(cluster_paths(self._spec.name))
        return record is not None and record.wanted == "running"

    async def _heal(self) -> Reachable:
        """Return where to go on after the controller was lost. A cluster that was taken down is not started again."""
        try:
            return await self._backend.reach(self._spec)
        except ClusterDownError:
            if await self._should_run():
                return await self._up()
            raise


def _log_step(step: Step) -> None:
    _log.info("%s", step)


async def _listens(reach: Reachable) -> bool:
    address = urlsplit(reach.url)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address.hostname, address.port), _KNOCK_S)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True
