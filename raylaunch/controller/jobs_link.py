"""The child program through which the controller speaks to a Ray of which only the dashboard's address is reached.

It is asked as `raylaunch.controller.ray_link` is, and does with Ray's Jobs API what stewards do elsewhere: Ray brings
the code and the runner, its log tells how the attempt goes, and its word counts for what is over. Nothing but the log
comes back. It does not load Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

from raylaunch.controller.jobs_attempts import FollowedAttempts
from raylaunch.controller.link import Config
from raylaunch.controller.link_events import LinkEvent, LinkUp, NodesChanged, event_frame
from raylaunch.controller.link_pipe import Stdin, Stdout, serve_all
from raylaunch.controller.nodes import RayNode, node_view
from raylaunch.controller.ray_dashboard import RayDashboard
from raylaunch.controller.ray_upload import COMMAND, pack
from raylaunch.errors import ClusterDownError, ClusterError, ConflictError, NotFoundError
from raylaunch.runner.contract import AttemptSpec

_log = logging.getLogger(__name__)

_LOOK_S = 1.0
_NODES_S = 3.0
_SILENT_S = 10.0


class Program:
    """The program, and what it sees of Ray."""

    def __init__(self, config: Config, stdout: Stdout, ray: RayDashboard) -> None:
        self._packages = Path(config["store"]) / "packages"
        self._stdout = stdout
        self._ray = ray
        self._rows: list[RayNode] = []
        self._attempts = FollowedAttempts(ray, store=Path(config["store"]), emit=self._emit, alive=self._alive)
        self._methods: dict[str, Callable[..., Awaitable[object]]] = {
            "nodes": self.nodes,
            "prepare": self.prepare,
            "stop": self.stop,
            "fence": self.fence,
            "settle": self.settle,
            "forget": self.forget,
            "kill_waiting": self.kill_waiting,
            **dict.fromkeys(("ray_fit", "index_look", "ray_log", "ray_log_grown", "end_actors"), _not_here),
        }

    async def run(self, stdin: Stdin) -> None:
        """Look at Ray and answer requests, for ever."""
        version = await self._ray.version()
        self._rows = await self._ray.nodes()
        self._emit(LinkUp(ray_version=version))
        ends = [
            asyncio.create_task(self._watch()),
            asyncio.create_task(serve_all(self._methods, stdin, self._stdout)),
        ]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            if end.done():
                end.result()

    async def nodes(self) -> list[dict[str, object]]:
        """Return the nodes as `raylaunch.cluster_state.NodeView`."""
        views = [node_view(row, None, steward=False).model_copy(update={"jobs_only": True}) for row in self._rows]
        return [view.model_dump(mode="json") for view in views]

    async def prepare(
        self,
        node_id: str,
        spec: AttemptSpec,
        package: str,
        secrets: dict[str, str],  # noqa: ARG002 -- a key that no job names: it stays here
        wheels: object,  # noqa: ARG002 -- the environment is made from the package index
    ) -> object:
        """Upload code and runner. The attempt's folder is made on the node, by the runner itself.

        Raises:
            ConflictError: the job names secrets, or its code is larger than Ray takes.
            NotFoundError: there is no such node or package.
        """
        if not self._alive(node_id):
            msg = f"there is no living node {node_id[:8]} in the Ray cluster"
            raise NotFoundError(msg)
        if spec["secrets"]:
            msg = f"the secret {spec['secrets'][0]} cannot be sent: only the dashboard's address of this Ray is reached"
            raise ConflictError(msg)
        upload = await asyncio.to_thread(pack, spec, self._packages / f"{package}.tar.gz" if package else None)
        await self._ray.upload(upload)
        return {"folder": "", "command": COMMAND, "working_dir": upload.uri}

    async def stop(self, node_id: str, attempt: str, wish: object) -> None:  # noqa: ARG002 -- Ray knows the grace
        """Have Ray stop it."""
        self._attempts.asked_to_stop(attempt)
        await self._ray.stop(attempt)

    async def fence(self, node_id: str, attempt: str, tag: str) -> object:  # noqa: ARG002 -- Ray's word has to do
        """Return how the attempt ended, once Ray says that it has."""
        return await self._attempts.over(attempt)

    async def settle(self, node_id: str, attempt: str, timeout_s: float) -> bool:  # noqa: ARG002 -- it is one file
        """Bring what is in the store of the attempt's log onto its disk."""
        return await self._attempts.settle(attempt)

    async def forget(self, node_id: str, attempt: str, *, again: bool) -> None:  # noqa: ARG002 -- what is left stays
        """Stop following the attempt."""
        self._attempts.forget(attempt)

    async def kill_waiting(self, submission: str) -> bool:
        """Have Ray stop a job that waits: it does so when that begins."""
        await self._ray.stop(submission)
        return True

    def _alive(self, node_id: str) -> bool:
        return any(row["id"] == node_id and row["alive"] for row in self._rows)

    async def _watch(self) -> None:
        answered_at = nodes_at = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._attempts.look()
                if time.monotonic() - nodes_at > _NODES_S:
                    await self._look_at_nodes()
                    nodes_at = time.monotonic()
                answered_at = time.monotonic()
            except ClusterDownError as error:
                _log.warning("%s", error.message)
                if time.monotonic() - answered_at > _SILENT_S:
                    self._stdout.fail(error.message)

    async def _look_at_nodes(self) -> None:
        rows = await self._ray.nodes()
        if rows != self._rows:
            self._rows = rows
            self._emit(NodesChanged())

    def _emit(self, event: LinkEvent) -> None:
        self._stdout.send(event_frame(event))


async def _not_here(**_: object) -> object:
    msg = "only the dashboard's address of this Ray is reached, and this takes Ray's own ports"
    raise ClusterError(msg)


def _token() -> str:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    return Path(path).read_text(encoding="utf-8").strip() if path else ""


async def _run(config: Config, stdin: Stdin, stdout: Stdout) -> None:
    ray = RayDashboard(config["dashboard_url"], _token())
    try:
        await Program(config, stdout, ray).run(stdin)
    except ClusterDownError as error:
        stdout.fail(error.message)


def main() -> None:
    """Read the configuration from stdin, and serve until stdin closes."""
    os.umask(0o077)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    stdin, stdout = Stdin(), Stdout()
    asyncio.run(_run(cast("Config", stdin.next()), stdin, stdout))


if __name__ == "__main__":
    main()
