"""The bridge's child program, which is connected to Ray and to the node agents; see `raylaunch.controller.ray.bridge`.

It may exit at any moment; Ray kills it when the head has exited. It exits when its stdin closes, since the controller
has exited then. It writes into the store and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import ray
import ray.exceptions

from raylaunch.agent.node_info import NodeFacts
from raylaunch.agent.packages import Platform, WheelSetData, choose_wheels
from raylaunch.controller.ray.bridge import Config
from raylaunch.controller.ray.calls import (
    RayNode,
    agent_on,
    connect,
    end_actors,
    kill_supervisor,
    node_view,
    nodes_of_ray,
)
from raylaunch.controller.ray.handover import bring
from raylaunch.controller.ray.protocol import BridgeEvent, BridgeUp, NodesChanged, Stdin, Stdout, serve_all
from raylaunch.controller.ray.replica import ReplicaStore
from raylaunch.controller.ray.replication import Replication
from raylaunch.errors import ClusterError, NotFoundError, RaylaunchError
from raylaunch.models.cluster import NodeView
from raylaunch.runner.archive import runner_zip

_log = logging.getLogger(__name__)

_CONNECT_S = 20.0
_RETRY_S = 0.2
_REFRESH_S = 1.0
_RAY_S = 10.0
_FACTS_S = 2.0
_MAX_BACKOFF_S = 10.0
_CALL_S = 45.0
_PIECE = 8 * 1024 * 1024


class ConnectedNode:
    """A living node, its agent, and the replication of its files."""

    def __init__(
        self, node_id: str, *, logs: str, namespace: str, store: Path, emit: Callable[[BridgeEvent], None]
    ) -> None:
        self._id = node_id
        self.logs = logs
        self._namespace = namespace
        self._actor: ray.actor.ActorHandle | None = None
        self._making = asyncio.Lock()
        self._facts: NodeFacts | None = None
        self._facts_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None
        self.replication = Replication(node_id, call=self.call, replica=ReplicaStore(store), emit=emit)
        self._following = asyncio.create_task(self.replication.run())

    def leave(self) -> None:
        """Stop following a node that was lost."""
        self._following.cancel()
        if self._asking is not None:
            self._asking.cancel()

    async def call(self, method: str, *args: object, timeout_s: float, **named: object) -> object:
        """Call the agent, starting it if there is none.

        Raises:
            ClusterError: It does not respond, or the node was lost.
            RaylaunchError: The agent raised it.
        """
        try:
            return await asyncio.wait_for(self._call(method, args, named), timeout_s)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaylaunchError):
                raise error.cause from None
            raise
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
            if isinstance(error, ray.exceptions.ActorDiedError):
                self._actor = None
            why = str(error).partition("\n")[0] or f"no response within {timeout_s:.0f} s"
            msg = f"the agent of node {self._id[:8]} does not respond to {method!r}: {why}"
            raise ClusterError(msg, hint="it is restarted automatically; see link.log in the store") from None

    async def _call(self, method: str, args: tuple[object, ...], named: Mapping[str, object]) -> object:
        async with self._making:
            if self._actor is None:
                self._actor = await asyncio.to_thread(agent_on, self._id, self._namespace)
            actor = self._actor
        return await getattr(actor, method).remote(*args, **named)

    @property
    def ready(self) -> bool:
        """Whether its agent responds and has described the node."""
        return self.replication.answering and self._facts is not None

    async def facts(self) -> NodeFacts | None:
        """Return the agent's description of its node, a few seconds old; an older one if the agent is slow.

        None if it has never responded: one agent that is still starting must not delay the other nodes.
        """
        if self._asking is None and asyncio.get_running_loop().time() - self._facts_at > _FACTS_S:
            self._asking = asyncio.create_task(self._request_facts())
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=_FACTS_S)
        return self._facts

    async def _request_facts(self) -> None:
        """Query once; if the node has never responded, retry until it does."""
        backoff_s = _REFRESH_S
        try:
            while True:
                limit_s = 5 if self._facts else _CALL_S / 3
                try:
                    before, self._facts = self._facts, cast("NodeFacts", await self.call("describe", timeout_s=limit_s))
                    if self._facts.gpu_problem and (before is None or before.gpu_problem != self._facts.gpu_problem):
                        _log.warning("the GPUs of node %s: %s", self._id, self._facts.gpu_problem)
                except ClusterError as error:
                    _log.warning("%s", error)
                except Exception:  # noqa: BLE001 -- a failure of one node must not affect the others
                    _log.exception("node %s could not be described", self._id)
                if self._facts is not None:
                    return
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
        finally:
            self._facts_at = asyncio.get_running_loop().time()  # also after a failure, to delay the next
            self._asking = None


class Program:
    """The connected program: methods that the controller calls, and the watch over Ray's nodes."""

    def __init__(self, config: Config, stdout: Stdout) -> None:
        self._store = Path(config["store"])
        self._namespace = config["namespace"]
        self._stdout = stdout
        self._nodes: dict[str, ConnectedNode] = {}
        self._rows: list[RayNode] = []
        self._last_state: object = None

    async def run(self, stdin: Stdin) -> None:
        """Watch the nodes and serve requests until stdin closes."""
        await self._refresh()
        self._stdout.send(BridgeUp(ray_version=ray.__version__))
        ends = [asyncio.create_task(self._watch()), asyncio.create_task(serve_all(self, stdin, self._stdout))]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            if end.done():
                end.result()

    async def nodes(self) -> tuple[NodeView, ...]:
        """Return the nodes that can be read."""
        views = await asyncio.gather(*(self._view(row) for row in self._rows))
        return tuple(view for view in views if view is not None)

    async def prepare(
        self, node_id: str, spec: dict[str, object], package: str, secrets: object, wheels: list[WheelSetData]
    ) -> object:
        """Send what the node lacks of package, wheels and earlier results; create the attempt's folder."""
        node = self._node(node_id)
        fitting = choose_wheels(wheels, await self._platform(node, spec)) if wheels else []
        for sha256 in [*([package] if package else []), *(wheel["sha256"] for wheel in fitting)]:
            await self._send_package(node, sha256)
        moved_from = await bring(node.call, self._store, str(spec["attempt"]), str(spec["tag"]))
        complete = {**spec, "wheels": fitting, "moved_from": moved_from}
        runner, have = await asyncio.to_thread(runner_zip), await node.replication.have(str(spec["attempt"]))
        return await node.call("prepare", complete, package, secrets, runner, have, timeout_s=600)

    async def _platform(self, node: ConnectedNode, spec: dict[str, object]) -> Platform:
        return cast("Platform", await node.call("platform", spec["environment"], spec["env"], timeout_s=_CALL_S))

    async def call_agent(self, node_id: str, method: str, args: tuple[object, ...], timeout_s: float) -> object:
        """Call a method of a node's agent."""
        return await self._node(node_id).call(method, *args, timeout_s=timeout_s)

    async def drain(self, node_id: str, attempt: str, timeout_s: float) -> bool:
        """Wait until the attempt's files are in the store."""
        node = self._node(node_id)
        try:
            return await asyncio.wait_for(node.replication.drain(attempt, timeout_s), timeout_s + 1)
        except (asyncio.TimeoutError, ClusterError) as error:
            _log.warning("the files of %s are not in the store yet: %s", attempt, error or "timeout")
            return False

    async def forget(self, node_id: str, attempt: str, *, again: bool) -> object:
        """Delete the attempt's folder on the node."""
        node = self._node(node_id)
        answer = await node.call("forget", attempt, again=again, timeout_s=2 * _CALL_S)
        await node.replication.forget(attempt)
        return answer

    async def bring_left(self, node_id: str, attempt: str, path: str, below: str) -> None:
        """Copy an output that was not kept into the store."""
        await self._node(node_id).replication.bring_left(attempt, path, below=below)

    async def ray_log(self, node_id: str, submission: str, **place: object) -> object:
        """Return bytes of the log of an external job."""
        node = self._node(node_id)
        return await node.call("ray_log", node.logs, submission, timeout_s=_CALL_S, **place)

    async def ray_log_grown(self, node_id: str, submission: str, size: int, wait_s: float) -> object:
        """Return the size of an external job's log once it has grown, or after a while."""
        node = self._node(node_id)
        return await node.call("ray_log_grown", node.logs, submission, size, wait_s, timeout_s=wait_s + _CALL_S)

    async def kill_waiting(self, submission: str) -> bool:
        """Kill the actor of a pending external job: nothing else ends it."""
        return await asyncio.to_thread(kill_supervisor, submission)

    async def end_actors(self, job_id: str) -> list[str]:
        """Kill the actors that a Ray job has left behind."""
        return await asyncio.to_thread(end_actors, job_id)

    async def _send_package(self, node: ConnectedNode, sha256: str) -> None:
        path = self._store / "packages" / f"{sha256}.tar.gz"
        have = cast("int", await node.call("package_have", sha256, timeout_s=_CALL_S))
        if have < 0:
            return
        try:
            with path.open("rb") as file:
                total = os.fstat(file.fileno()).st_size
                while have >= 0:
                    file.seek(have)
                    data = await asyncio.to_thread(file.read, _PIECE)
                    have = cast("int", await node.call("put_package", sha256, have, total, data, timeout_s=300))
        except FileNotFoundError:
            msg = f"the package {sha256[:12]} is not in the store"
            raise NotFoundError(msg, hint="submit again") from None

    def _node(self, node_id: str) -> ConnectedNode:
        node = self._nodes.get(node_id)
        if node is None:
            msg = f"there is no living node {node_id[:8] or '(empty id)'} in the Ray cluster"
            raise NotFoundError(msg)
        return node

    async def _view(self, row: RayNode) -> NodeView | None:
        node = self._nodes.get(row["id"])
        facts = await node.facts() if node else None
        return node_view(row, facts, agent_responds=node is not None and node.ready)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            await self._refresh()

    async def _refresh(self) -> None:
        """Get the nodes from Ray; follow new ones, and leave lost ones."""
        try:
            self._rows = await asyncio.wait_for(asyncio.to_thread(nodes_of_ray), _RAY_S)
        except (asyncio.TimeoutError, ray.exceptions.RayError) as error:
            self._stdout.fail(f"Ray's head does not respond ({str(error) or f'not within {_RAY_S:.0f} s'})")
        alive = {row["id"] for row in self._rows if row["alive"]}
        for gone in self._nodes.keys() - alive:
            self._nodes.pop(gone).leave()
        for row in self._rows:
            if row["alive"] and row["id"] not in self._nodes:
                self._nodes[row["id"]] = ConnectedNode(
                    row["id"], logs=row["logs"], namespace=self._namespace, store=self._store, emit=self._stdout.send
                )
        state = [(row, row["id"] in alive and self._nodes[row["id"]].ready) for row in self._rows]
        if state != self._last_state:
            self._last_state = state
            self._stdout.send(NodesChanged())


def _connect(config: Config, stdout: Stdout) -> None:
    """Connect to Ray within the time limit, in the main thread, as Ray requires."""
    address = config["gcs_address"]
    late = threading.Timer(
        _CONNECT_S, partial(stdout.fail, f"Ray at {address} did not respond within {_CONNECT_S:.0f} s")
    )
    late.daemon = True
    late.start()
    while (
        head := _open_socket(address)
    ) is None:  # a connection that Ray begins before hangs, long after it has come back
        time.sleep(_RETRY_S)
    root = Path(__file__).resolve().parents[3]
    os.chdir("/" if root.name in {"site-packages", "dist-packages"} else root)  # Ray puts it on workers' sys.path
    try:
        connect(address, config["namespace"], carries=config["carries"])
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        traceback.print_exc()
        stdout.fail(f"cannot connect to Ray at {address}: {str(error).partition(chr(10))[0]}")
    late.cancel()
    if _closed_by_peer(head):  # then Ray waits for the next head, and calls on this connection never return
        stdout.fail(f"Ray at {address} exited during the connection")


def _open_socket(address: str) -> socket.socket | None:
    host, _, port = address.rpartition(":")
    try:
        return socket.create_connection((host, int(port)), timeout=_RETRY_S)
    except OSError:
        return None


def _closed_by_peer(head: socket.socket) -> bool:
    """Whether the listener has exited: while it is alive it sends nothing, since it waits for the first request."""
    with head:
        head.settimeout(0)
        try:
            while data := head.recv(1024):
                del data
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


def main() -> None:
    """Read the configuration from stdin, connect, and serve until stdin closes."""
    os.umask(0o077)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    stdin, stdout = Stdin(), Stdout()
    config = cast("Config", stdin.next())
    _connect(config, stdout)
    asyncio.run(Program(config, stdout).run(stdin))


if __name__ == "__main__":
    main()
