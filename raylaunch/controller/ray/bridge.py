"""The controller's side of its link to Ray: it keeps the child program `raylaunch.controller.ray.process` running.

Ray ends any process that is connected to it a minute after its head is gone, so the connection lives in a child that
may die and be started again. Both speak JSON lines over the child's stdin and stdout; what attempts write on nodes is
put into the store by the child itself, and never passes through here.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from raylaunch.contract import AttemptSpec, Claim, Exit, StopWish
from raylaunch.controller.ray.calls import node_views
from raylaunch.controller.ray.protocol import (
    LinkDown,
    LinkEvent,
    LinkUp,
    child_command,
    child_environment,
    end,
    event_from,
    exit_from,
    open_log,
)
from raylaunch.errors import ClusterDownError, from_wire
from raylaunch.models.cluster import NodeView
from raylaunch.models.job import WheelSet

_log = logging.getLogger(__name__)

_PROGRAM = "raylaunch.controller.ray.process"
_LINE_LIMIT = 64 * 1024 * 1024
_LONGEST_BACKOFF_S = 10.0
_STEADY_S = 30.0


@dataclass(frozen=True)
class PreparedAttempt:
    """An attempt is ready on its node: submit `command` to Ray as the entrypoint."""

    folder: str
    command: str


@dataclass(frozen=True)
class Fenced:
    """No process of the attempt lives on the node, and none can start any more."""

    killed: int
    """Processes that had to be ended."""
    claim: Claim | None
    """Who had claimed it; its epoch is ``fenced`` when nobody had and the fence took it."""
    exit: Exit | None
    """How it ended, when its runner lived to say so."""
    beat_at: float | None = None
    """When its runner was last alive; None when none ever was."""


class Config(TypedDict):
    """The child's first line on stdin."""

    gcs_address: str
    store: str
    namespace: str
    carries: bool


_LEFT_S = 3600.0


class RayBridge:
    """The link to Ray and its stewards. Use it from one event loop."""

    def __init__(  # noqa: PLR0913 -- each is a fact about one Ray, and all are named
        self,
        *,
        gcs_address: str,
        ray_token_path: Path,
        ray_env: Mapping[str, str] | None = None,
        store: Path,
        on_event: Callable[[LinkEvent], None],
        log_path: Path,
        namespace: str = "raylaunch",
        carries: bool = False,
    ) -> None:
        """Describe the link; nothing happens before `start`.

        Args:
            gcs_address: ``host:port`` of Ray's GCS.
            ray_token_path: The file with Ray's token; its content enters no argument list.
            ray_env: Variables with which the child connects to Ray, for example which certificate it has.
            store: The folder that the child writes into.
            on_event: Called in the event loop, in order, for each event. It must not block.
            log_path: Gets what the child and Ray's core say on stderr.
            namespace: Ray namespace of the stewards.
            carries: Whether Ray is to bring raylaunch's code to its nodes, for it is not there.
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
        self._keeper: asyncio.Task[None] | None = None
        self._up = False
        self._why = "the link to Ray has not been started"

    @property
    def up(self) -> bool:
        """Whether the child is connected to Ray now."""
        return self._up

    @property
    def why_down(self) -> str:
        """Why the link is down, in words; empty when it is up."""
        return "" if self._up else self._why

    @property
    def pid(self) -> int | None:
        """Process id of the child, or None when there is none now."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        """Start the child and keep it running. Returns at once: `LinkUp` says when it is connected."""
        if self._keeper is None:
            self._why = "the link to Ray is starting"
            self._keeper = asyncio.create_task(self._keep_running(), name="link")

    async def close(self) -> None:
        """End the child and wait for its end."""
        if self._keeper is None:
            return
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        self._keeper = None

    async def nodes(self) -> tuple[NodeView, ...]:
        """Return the cluster's nodes, dead ones too, as Ray and the stewards see them (at most a second old).

        Raises:
            ClusterDownError: The link is down.
        """
        answer = await self.call("nodes", {}, timeout_s=30)
        return node_views(cast("list[object]", answer))

    async def prepare(
        self,
        node_id: str,
        *,
        spec: AttemptSpec,
        package: str,
        secrets: Mapping[str, str],
        wheels: Sequence[WheelSet] = (),
    ) -> PreparedAttempt:
        """Make the attempt's folder on a node: code, runner, secrets. May be repeated.

        Args:
            node_id: Ray's id of the node.
            spec: What the runner needs to know. An empty ``envs_dir`` is filled in by the steward.
            package: sha256 of the packed code in the store; empty for none. It is sent when the node lacks it.
            secrets: Values by name; they travel by pipe and by Ray's own channel, and lie on the node in a 0600 file.
            wheels: What its environment is made of, by platform; those of the node's are sent when it lacks them.

        Raises:
            ClusterDownError: The link is down.
            NotFoundError: There is no such node, or no such package in the store.
            ClusterError: The node's steward does not answer.
            StorageError: The node's disk is full.
            TransferError: The package arrived damaged.
        """
        sets = [one.model_dump(mode="json") for one in wheels]
        params = {"node_id": node_id, "spec": spec, "package": package, "secrets": dict(secrets), "wheels": sets}
        answer = cast("dict[str, str]", await self.call("prepare", params, timeout_s=900))
        return PreparedAttempt(folder=answer["folder"], command=answer["command"])

    async def stop(self, node_id: str, attempt: str, wish: StopWish) -> None:
        """Tell the attempt's runner to stop its training. May be repeated; a later wish replaces the earlier.

        Raises:
            ClusterDownError: The link is down.
            NotFoundError: There is no such node.
            ClusterError: The node's steward does not answer.
        """
        await self.call("stop", {"node_id": node_id, "attempt": attempt, "wish": wish}, timeout_s=60)

    async def fence(self, node_id: str, attempt: str, tag: str) -> Fenced:
        """End every process of the attempt on the node, and make sure that none can start there again.

        Args:
            node_id: Ray's id of the node.
            attempt: The attempt's id, ``<job>-<n>``.
            tag: Value of ``RAYLAUNCH_ATTEMPT_ID`` in its processes' environment.

        Raises:
            ClusterDownError: The link is down.
            NotFoundError: There is no such node.
            ClusterError: The node's steward does not answer, or processes survived SIGKILL for 30 s.
        """
        params = {"node_id": node_id, "attempt": attempt, "tag": tag}
        answer = cast("dict[str, object]", await self.call("fence", params, timeout_s=90))
        return Fenced(
            killed=cast("int", answer["killed"]),
            claim=cast("Claim | None", answer["claim"]),
            exit=exit_from(answer["exit"], now=time.time()),
            beat_at=cast("float | None", answer.get("beat_at")),
        )

    async def drain(self, node_id: str, attempt: str, timeout_s: float) -> bool:
        """Wait until all that the attempt left on the node is in the store, with matching sizes and checksums.

        Returns:
            False when that was not so within `timeout_s`.

        Raises:
            ClusterDownError: The link is down.
            NotFoundError: There is no such node.
        """
        params = {"node_id": node_id, "attempt": attempt, "timeout_s": timeout_s}
        return bool(await self.call("settle", params, timeout_s=timeout_s + 30))

    async def forget(self, node_id: str, attempt: str, *, again: bool = False) -> None:
        """Delete the attempt's folder on the node. May be repeated.

        Args:
            node_id: Ray's id of the node.
            attempt: The attempt's id.
            again: Another attempt follows; its checkpoints wait there for it.

        Raises:
            ClusterDownError: The link is down.
            NotFoundError: There is no such node.
            ClusterError: The node's steward does not answer.
        """
        await self.call("forget", {"node_id": node_id, "attempt": attempt, "again": again}, timeout_s=120)

    async def bring_left(self, node_id: str, attempt: str, path: str, *, below: str) -> None:
        """Bring an output that was not kept, and stayed on the node, into the store.

        Args:
            node_id: Ray's id of the node.
            attempt: The attempt's id.
            path: Of the file, relative to the working directory.
            below: The folder of the attempt in the store that it goes into.

        Raises:
            ClusterDownError: The link is down.
            NotFoundError: There is no such node, or the file is not there any more.
            ClusterError: The node's agent does not answer.
        """
        asked = {"node_id": node_id, "attempt": attempt, "path": path, "below": below}
        await self.call("bring_left", asked, timeout_s=_LEFT_S)

    async def call(self, method: str, params: Mapping[str, object], *, timeout_s: float) -> object:
        """Ask the child for one of the methods of `raylaunch.controller.ray.process.Program`.

        Raises:
            ClusterDownError: The link is down, or did not answer within `timeout_s`.
            RaylaunchError: What the method raised.
        """
        child = self._child
        if not self._up or child is None or child.stdin is None:
            raise self._down()
        number = next(self._numbers)
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            child.stdin.write(_line({"id": number, "method": method, "params": params}))
            await child.stdin.drain()
            return await asyncio.wait_for(future, timeout_s)
        except (ConnectionError, asyncio.IncompleteReadError):
            raise self._down() from None
        except asyncio.TimeoutError:
            msg = f"Ray's link did not answer {method!r} within {timeout_s:.0f} s"
            raise ClusterDownError(msg, hint=f"its log: {self._log_path}") from None
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # taken, also when the write failed first

    def _down(self) -> ClusterDownError:
        return ClusterDownError(f"Ray cannot be reached: {self._why}", hint=f"the link's log: {self._log_path}")

    async def _keep_running(self) -> None:
        backoff_s = 0.5
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                why = await self._run_child()
            except OSError as error:
                why = f"the link could not be started: {error}"
            except Exception as error:  # noqa: BLE001 -- the top of a task: what the child says must not end it
                _log.exception("the link failed; it is started again")
                why = f"the link failed: {error}"
            finally:
                self._fall("the link to Ray was closed")
            self._fall(why)
            self._tell(LinkDown(why=why))
            backoff_s = 0.5 if loop.time() - began > _STEADY_S else min(backoff_s * 2, _LONGEST_BACKOFF_S)
            await asyncio.sleep(backoff_s)

    async def _run_child(self) -> str:
        """Run one child to its end, and return why it ended."""
        with open_log(self._log_path) as log:
            child = await asyncio.create_subprocess_exec(
                *child_command(_PROGRAM),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=child_environment(os.environ, self._ray_token_path, self._ray_env),
                limit=_LINE_LIMIT,
                start_new_session=True,
            )
        self._child = child
        try:
            if child.stdin is not None:
                child.stdin.write(_line(self._config))
            last_words = await self._listen(child)
            return last_words or f"the link ended with exit status {await child.wait()}"
        finally:
            await asyncio.shield(end(child))
            self._child = None

    async def _listen(self, child: asyncio.subprocess.Process) -> str:
        """Take the child's frames until its stdout ends; return what it said last about why it ends."""
        why = ""
        if child.stdout is None:
            return why
        while line := await child.stdout.readline():
            why = self._take(line) or why
        return why

    def _take(self, line: bytes) -> str:
        """Take one frame; return what it says about why the child ends, mostly nothing."""
        try:
            frame = cast("dict[str, object]", json.loads(line))
            if "id" in frame:
                self._answer(frame)
            elif frame["event"] == "down":
                return str(frame["why"])
            else:
                self._event(frame)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            _log.warning("the link wrote a line that is not a frame: %.200r", line)
        return ""

    def _answer(self, frame: Mapping[str, object]) -> None:
        future = self._waiting.get(cast("int", frame["id"]))
        if future is None or future.done():
            return
        if "error" in frame:
            error = cast("dict[str, str]", frame["error"])
            future.set_exception(from_wire(error["code"], error["message"], error["hint"]))
        else:
            future.set_result(frame["result"])

    def _event(self, frame: dict[str, object]) -> None:
        event = event_from(frame)
        if isinstance(event, LinkUp):
            self._up = True
        self._tell(event)

    def _tell(self, event: LinkEvent) -> None:
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001 -- a bug of a listener must not cut the link
            _log.exception("the link's event %s was not taken", type(event).__name__)

    def _fall(self, why: str) -> None:
        self._up = False
        self._why = why
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._down())


def _line(frame: Mapping[str, object]) -> bytes:
    return json.dumps(frame, separators=(",", ":")).encode() + b"\n"
