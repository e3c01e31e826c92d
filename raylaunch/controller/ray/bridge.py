"""The controller's side of the bridge to Ray: it keeps the child program `raylaunch.controller.ray.process` running.

Ray ends every process that is connected to it a minute after its head has exited, so the connection is held by a child
that may exit and is restarted. They exchange frames over the child's stdin and stdout (`raylaunch.controller.ray.
protocol`). The child itself writes files of attempts into the store; they never pass through here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, cast

from raylaunch.agent.agent import FenceResult
from raylaunch.agent.job_dir import ReadyAttempt
from raylaunch.contract import AttemptSpec, StopWish
from raylaunch.controller.ray.protocol import (
    BridgeDown,
    BridgeEvent,
    BridgeUp,
    Response,
    child_command,
    child_environment,
    end,
    exit_from,
    open_log,
    pack,
    read_frame,
)
from raylaunch.errors import ClusterDownError
from raylaunch.models.cluster import NodeView
from raylaunch.models.job import WheelSet

_log = logging.getLogger(__name__)

_PROGRAM = "raylaunch.controller.ray.process"
_LONGEST_BACKOFF_S = 10.0
_STEADY_S = 30.0
_LEFT_S = 3600.0
_MARGIN_S = 15.0


class Config(TypedDict):
    """The first value on the child's stdin."""

    gcs_address: str
    store: str
    namespace: str
    carries: bool


class RayBridge:
    """The connection to Ray and the node agents. Use it from one event loop.

    Every request raises `ClusterDownError` if the connection is down, `NotFoundError` if there is no such node, and
    `ClusterError` if the node's agent does not respond.
    """

    def __init__(  # noqa: PLR0913 -- each is a fact about one Ray, and all are named
        self,
        *,
        gcs_address: str,
        ray_token_path: Path,
        ray_env: Mapping[str, str] | None = None,
        store: Path,
        on_event: Callable[[BridgeEvent], None],
        log_path: Path,
        namespace: str = "raylaunch",
        carries: bool = False,
    ) -> None:
        """Configure the bridge; nothing happens before `start`.

        Args:
            gcs_address: ``host:port`` of Ray's GCS.
            ray_token_path: The file with Ray's token; the token never appears in an argument list.
            ray_env: Variables with which the child connects to Ray, for example the path of its certificate.
            store: The folder that the child writes into.
            on_event: Called in the event loop, in order, for each event. It must not block.
            log_path: Log file for stderr of the child and of Ray's core.
            namespace: Ray namespace of the agents.
            carries: Whether Ray must copy raylaunch's code to its nodes, because it is not installed there.
        """
        self._config = Config(
            gcs_address=gcs_address,
            store=str(store),
            namespace=namespace,
            carries=carries,
        )
        self._ray_token_path = ray_token_path
        self._ray_env = dict(ray_env or {})
        self._on_event = on_event
        self._log_path = log_path
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[object]] = {}
        self._child: asyncio.subprocess.Process | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._up = False
        self._why = "the connection to Ray has not been started"

    @property
    def up(self) -> bool:
        """Whether the child is connected to Ray now."""
        return self._up

    @property
    def pid(self) -> int | None:
        """Process id of the child, or None if it is not running."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        """Start the child and keep it running. Returns immediately; `BridgeUp` reports the connection."""
        if self._supervision is None:
            self._why = "connecting"
            self._supervision = asyncio.create_task(self._keep_running(), name="bridge")

    async def close(self) -> None:
        """Stop the child and wait for its exit."""
        if self._supervision is None:
            return
        self._supervision.cancel()
        await asyncio.gather(self._supervision, return_exceptions=True)
        self._supervision = None

    async def nodes(self) -> tuple[NodeView, ...]:
        """Return the cluster's nodes, dead ones too, as Ray and the agents report them (at most a second old)."""
        return cast("tuple[NodeView, ...]", await self.call("nodes", {}, timeout_s=30))

    async def prepare(
        self,
        node_id: str,
        *,
        spec: AttemptSpec,
        package: str,
        secrets: Mapping[str, str],
        wheels: Sequence[WheelSet] = (),
    ) -> ReadyAttempt:
        """Create the attempt's folder on a node: code, runner, secrets. May be repeated.

        Args:
            node_id: Ray's id of the node.
            spec: The runner's specification. The agent fills in an empty ``envs_dir``.
            package: sha256 of the packed code in the store; empty for none. It is sent if the node lacks it.
            secrets: Values by name; sent through pipes and Ray's own channel, and stored on the node in a 0600 file.
            wheels: Wheels of its environment, by platform; those for the node's are sent if it lacks them.

        Raises:
            NotFoundError: No such package is in the store.
            StorageError: The node's disk is full.
            TransferError: The package arrived damaged.
        """
        sets = [one.model_dump(mode="json") for one in wheels]
        params = {"node_id": node_id, "spec": spec, "package": package, "secrets": dict(secrets), "wheels": sets}
        return cast("ReadyAttempt", await self.call("prepare", params, timeout_s=900))

    async def stop(self, node_id: str, attempt: str, wish: StopWish) -> None:
        """Ask the attempt's runner to stop. May be repeated; a later request replaces the earlier one."""
        await self.call_agent(node_id, "stop", attempt, wish, timeout_s=45)

    async def fence(self, node_id: str, attempt: str, tag: str) -> FenceResult:
        """End every process of the attempt on the node, and prevent that any starts there again.

        Args:
            node_id: Ray's id of the node.
            attempt: The attempt's id, ``<job>-<n>``.
            tag: Value of ``RAYLAUNCH_ATTEMPT_ID`` in its processes' environment.

        Raises:
            ClusterError: Processes survived SIGKILL for 30 s.
        """
        found = cast("FenceResult", await self.call_agent(node_id, "fence", attempt, tag, timeout_s=90))
        return found._replace(exit=exit_from(found.exit, now=time.time()))

    async def drain(self, node_id: str, attempt: str, timeout_s: float) -> bool:
        """Wait until all files of the attempt on the node are in the store, with matching sizes and checksums.

        Returns False if that took longer than `timeout_s`.
        """
        params = {"node_id": node_id, "attempt": attempt, "timeout_s": timeout_s}
        return bool(await self.call("drain", params, timeout_s=timeout_s + 30))

    async def forget(self, node_id: str, attempt: str, *, again: bool = False) -> None:
        """Delete the attempt's folder on the node. May be repeated.

        With `again` another attempt follows, for which its checkpoints are kept there.
        """
        await self.call("forget", {"node_id": node_id, "attempt": attempt, "again": again}, timeout_s=120)

    async def bring_left(self, node_id: str, attempt: str, path: str, *, below: str) -> None:
        """Copy an output that was not kept, and is still on the node, into the store.

        Args:
            node_id: Ray's id of the node.
            attempt: The attempt's id.
            path: The file's path, relative to the working directory.
            below: The attempt's folder in the store that receives it.

        Raises:
            NotFoundError: The file no longer exists.
        """
        params = {"node_id": node_id, "attempt": attempt, "path": path, "below": below}
        await self.call("bring_left", params, timeout_s=_LEFT_S)

    async def call_agent(self, node_id: str, method: str, *args: object, timeout_s: float) -> object:
        """Call one of the methods of `raylaunch.agent.agent.NodeAgent`, which must respond within `timeout_s`."""
        params = {"node_id": node_id, "method": method, "args": args, "timeout_s": timeout_s}
        return await self.call("call_agent", params, timeout_s=timeout_s + _MARGIN_S)

    async def call(self, method: str, params: Mapping[str, object], *, timeout_s: float) -> object:
        """Call one of the methods of `raylaunch.controller.ray.process.Program`.

        Raises:
            ClusterDownError: The connection is down, or there was no response within `timeout_s`.
            RaylaunchError: The method raised it.
        """
        child = self._child
        if not self._up or child is None or child.stdin is None:
            raise self._down()
        number = next(self._numbers)
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            child.stdin.write(pack((number, method, dict(params))))
            await child.stdin.drain()
            return await asyncio.wait_for(future, timeout_s)
        except ConnectionError:
            raise self._down() from None
        except asyncio.TimeoutError:
            msg = f"the bridge to Ray did not respond to {method!r} within {timeout_s:.0f} s"
            raise ClusterDownError(msg, hint=f"see its log: {self._log_path}") from None
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # retrieved, also if the write failed first

    def _down(self) -> ClusterDownError:
        return ClusterDownError(f"Ray cannot be reached: {self._why}", hint=f"see the log: {self._log_path}")

    async def _keep_running(self) -> None:
        backoff_s = 0.5
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                why = await self._run_child()
            except OSError as error:
                why = f"the bridge process could not be started: {error}"
            except Exception as error:  # noqa: BLE001 -- the top of a task: the child's output must not end it
                _log.exception("the bridge failed; restarting it")
                why = f"the bridge failed: {error}"
            finally:
                self._set_down("the connection to Ray was closed")
            self._set_down(why)
            self._notify(BridgeDown(why=why))
            backoff_s = 0.5 if loop.time() - started > _STEADY_S else min(backoff_s * 2, _LONGEST_BACKOFF_S)
            await asyncio.sleep(backoff_s)

    async def _run_child(self) -> str:
        """Run one child until it exits, and return why it did."""
        with open_log(self._log_path) as log:
            child = await asyncio.create_subprocess_exec(
                *child_command(_PROGRAM),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=child_environment(os.environ, self._ray_token_path, self._ray_env),
                start_new_session=True,
            )
        self._child = child
        try:
            if child.stdin is not None:
                child.stdin.write(pack(self._config))
            why = await self._listen(child)
            return why or f"the bridge process exited with status {await child.wait()}"
        finally:
            await asyncio.shield(end(child))
            self._child = None

    async def _listen(self, child: asyncio.subprocess.Process) -> str:
        """Handle the child's frames until its stdout ends; return the reason that it gave for its end, if any."""
        why = ""
        while child.stdout is not None:
            try:
                frame = await read_frame(child.stdout)
            except EOFError:
                break
            match frame:
                case BridgeDown():
                    why = frame.why
                case tuple():
                    self._handle_response(cast("Response", frame))
                case _:
                    self._up = self._up or isinstance(frame, BridgeUp)
                    self._notify(cast("BridgeEvent", frame))
        return why

    def _handle_response(self, response: Response) -> None:
        number, result, error = response
        future = self._waiting.get(number)
        if future is None or future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _notify(self, event: BridgeEvent) -> None:
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001 -- a bug in a listener must not break the connection
            _log.exception("handling the event %s failed", type(event).__name__)

    def _set_down(self, why: str) -> None:
        self._up = False
        self._why = why
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._down())
