"""Starting the controller beside a Ray, whoever started that: on a free port, waited for until it answers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import anyio

from raylaunch.cluster import assign
from raylaunch.cluster.controller_program import (
    admit,
    controller_argv,
    controller_environment,
    controller_status,
    write_config,
)
from raylaunch.cluster.health import start_s_left
from raylaunch.cluster.home import ClusterPaths
from raylaunch.cluster.ports import is_free
from raylaunch.cluster.process import end, is_alive
from raylaunch.cluster.record import ClusterRecord, save_record
from raylaunch.cluster.steps import DiedError, Steps
from raylaunch.cluster.sweep import of_controller
from raylaunch.version import __version__

CONTROLLER_S = 60.0
_HUNG_S = 5.0
_POLL_S = 0.1


class ControllerStart:
    """One start of a cluster's controller. `record` is kept up to date, here and on the disk.

    Args:
        paths: of the cluster.
        steps: told what is done.
        record: the cluster's, with the ports of its Ray.
        token: the client's.
    """

    def __init__(
        self,
        paths: ClusterPaths,
        steps: Steps,
        record: ClusterRecord,
        *,
        token: str,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.record = record
        self._paths = paths
        self._steps = steps
        self._token = token
        self._environ = environ

    async def run(self, *, wait: bool, upgrade: bool) -> ClusterRecord:
        """Have a controller that answers; one that runs and answers stays, unless it is to be replaced.

        Raises:
            ClusterStartError: it ended, or does not answer in time.
        """
        if is_alive(self.record.controller) and not upgrade and await self._answers_soon():
            return self.record
        for last_try in (False, True):
            await self._start()
            if not wait:
                break
            try:
                await self._steps.step("controller", "waits for the controller", self._answering, CONTROLLER_S)
            except DiedError:
                if last_try or self.record.spec.port or is_free(self.record.ports["controller"]):
                    raise
                self._steps.note("controller", "its port was taken in that moment; another one is used")
            else:
                self._save(self.record.with_(controller_answered=True))
                break
        return self.record

    async def _answers_soon(self) -> bool:
        with anyio.move_on_after(max(_HUNG_S, start_s_left(self.record))):
            while is_alive(self.record.controller):
                if not await self._why_silent():
                    return True
                await anyio.sleep(_POLL_S)
        return False

    async def _start(self) -> None:
        """Start the controller; one that hangs, or that no record knows of, is ended first. Jobs go on meanwhile."""
        left = of_controller(self.record.cluster_id)
        if left:
            self._steps.note("controller", f"ends the controller of before (pid {left[0].pid}); jobs go on")
            await end(left, grace_s=5)
        ports = self.record.ports
        taken = tuple(port for key, port in ports.items() if key != "controller")
        if "worker_min" in ports:
            taken += tuple(range(ports["worker_min"], ports["worker_max"] + 1))
        port = assign.controller_port(
            ports,
            fixed=self.record.spec.port,
            say=lambda words: self._steps.note("ports", words),
            avoid=taken,
        )
        versions = self.record.versions.model_copy(update={"raylaunch": __version__})
        ports = ports | {"controller": port}
        self._save(self.record.with_(ports=ports, controller=None, controller_answered=False, versions=versions))
        write_config(self._paths, self.record)
        admit(Path(self.record.store), self._token)
        env = controller_environment(self._paths, self.record, self._environ)
        controller = await self._steps.start(controller_argv(self._paths), env, self._paths.controller_log)
        self._save(self.record.with_(controller=controller))

    def _save(self, record: ClusterRecord) -> None:
        self.record = save_record(self._paths, record)

    async def _answering(self) -> str:
        self._steps.must_live("controller", "the controller", self.record.controller, self._paths.controller_log)
        return await self._why_silent()

    async def _why_silent(self) -> str:
        status = await controller_status(self.record.ports["controller"], self._token)
        return status if isinstance(status, str) else ""
