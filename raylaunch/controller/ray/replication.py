"""Replication of one node's files into the store, run by the bridge's process. Knows no Ray: it gets an `AgentCall`.

The agent is queried with long polls; the next one is under way while a reply is being written. After any failure a new
session starts from what is on the store's disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar, cast

from raylaunch.agent.change_feed import ChangeReply, Chunk, HaveFile
from raylaunch.agent.job_dir import LeftPiece
from raylaunch.agent.packages import storage_error
from raylaunch.contract import OUTPUTS
from raylaunch.controller.ray.protocol import BridgeEvent, Grew, StoreProblem, observed
from raylaunch.controller.ray.replica import GapError, ReplicaStore
from raylaunch.errors import ClusterError

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_POLL_S = 10.0
_CALL_S = 60.0
_HASH_S = 600.0
_LEFT_PIECE = 8 * 1024 * 1024
_DRAIN_POLL_S = 0.05
_SHORT_S, _LONGEST_BACKOFF_S = 0.1, 10.0
_STEADY_S = 5.0
"""A session that ends sooner counts as a failure."""


AgentCall = Callable[..., Awaitable[object]]
"""Calls a method of `raylaunch.agent.agent.NodeAgent`; raises `ClusterError` if it does not respond in `timeout_s`."""


class Replication:
    """Follows one agent, and writes the files that it sends."""

    def __init__(
        self, node_id: str, *, call: AgentCall, replica: ReplicaStore, emit: Callable[[BridgeEvent], None]
    ) -> None:
        self._node_id = node_id
        self._call = call
        self._replica = replica
        self._emit = emit
        self._writing = asyncio.Lock()
        self._resync = asyncio.Event()
        self.answering = False
        """Whether the agent responded last time."""

    async def run(self) -> None:
        """Follow until cancelled."""
        backoff_s = 0.0
        while True:
            await asyncio.sleep(backoff_s)
            started = time.monotonic()
            try:
                await self._session()
                steady = time.monotonic() - started > _STEADY_S
                backoff_s = _SHORT_S if steady else min(max(backoff_s * 2, _SHORT_S), _LONGEST_BACKOFF_S)
            except ClusterError as error:
                self.answering = False
                _log.warning("%s", error)
                backoff_s = min(max(backoff_s * 2, 0.2), _LONGEST_BACKOFF_S)
            except Exception:  # noqa: BLE001 -- a failure of one node must not affect the others
                _log.exception("replication of node %s failed", self._node_id)
                backoff_s = min(max(backoff_s * 2, 0.5), _LONGEST_BACKOFF_S)

    async def drain(self, attempt: str, timeout_s: float) -> bool:
        """Wait until all files of an ended attempt are in the store, verified and flushed to disk."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not await self._drained(attempt):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(_DRAIN_POLL_S)
        return True

    async def have(self, attempt: str) -> Mapping[str, HaveFile]:
        """Return which files of an attempt, or of the previous one, the store has."""
        found = await self._write(lambda: self._replica.have([attempt]))
        return found.get(attempt, {})

    async def bring_left(self, attempt: str, path: str, *, below: str = OUTPUTS) -> None:
        """Copy an output that was not kept, and is still on the node, into a folder of the attempt.

        Raises:
            NotFoundError: it no longer exists.
            ClusterError: the node does not respond.
        """
        digest, offset, final = hashlib.sha256(), 0, False
        await self._write(lambda: self._replica.have([attempt]))
        while not final:
            asked = self._call("read_left", attempt, path, offset, _LEFT_PIECE, timeout_s=_CALL_S)
            data, size, mtime_ns = cast("LeftPiece", await asked)
            digest.update(data)
            final = offset + len(data) >= size or not data
            sha256 = digest.hexdigest() if final else ""
            chunk = Chunk(attempt, f"{below}/{path}", "replace", size, mtime_ns, offset, data, final, sha256)
            for event in await self._write_chunks([chunk]):
                self._emit(event)
            offset += len(data)

    async def forget(self, attempt: str) -> None:
        """Drop the cached state of an attempt that was deleted on the node."""
        await self._write(lambda: self._replica.forget(attempt))

    async def _drained(self, attempt: str) -> bool:
        if not self._replica.wanted(attempt):
            return True
        inventory = await self._inventory(attempt, checksums=False)
        if await asyncio.to_thread(
            self._replica.missing, attempt, {path: size for path, (size, _) in inventory.items()}
        ):
            return False
        inventory = await self._inventory(attempt, checksums=True)
        sizes = {path: size for path, (size, _) in inventory.items()}
        checksums = {path: sha256 for path, (_, sha256) in inventory.items()}
        if await asyncio.to_thread(self._replica.missing, attempt, sizes):
            return False
        differing = await asyncio.to_thread(self._replica.differing, attempt, checksums)
        if differing:
            _log.warning("%s: %s differ and will be sent again", attempt, ", ".join(differing))
            await self._write(lambda: self._replica.drop(attempt, differing))
            self._resync.set()
            return False
        await asyncio.to_thread(self._replica.sync, attempt, list(checksums))
        for event in await self._write(lambda: self._replica.finalize(attempt, checksums)):
            self._emit(event)
        return True

    async def _inventory(self, attempt: str, *, checksums: bool) -> dict[str, tuple[int, str]]:
        limit_s = _HASH_S if checksums else _CALL_S
        found = await self._call("inventory", attempt, timeout_s=limit_s, checksums=checksums)
        return cast("dict[str, tuple[int, str]]", found)

    async def _session(self) -> None:
        self._resync.clear()
        session = secrets.token_hex(8)
        attempts = cast("list[str]", await self._call("attempts", timeout_s=_CALL_S))
        self.answering = True
        have = await self._write(lambda: self._replica.have(attempts))
        asked = self._ask(session, have)
        resync = asyncio.create_task(self._resync.wait())
        try:
            while not self._resync.is_set():
                await asyncio.wait({asked, resync}, return_when=asyncio.FIRST_COMPLETED)
                if not asked.done():
                    return
                answer = asked.result()
                self.answering = True
                if answer["resync"]:
                    return
                asked = self._ask(session, None)
                await self._apply(answer)
        except GapError as error:
            _log.info("node %s: %s", self._node_id, error)
        finally:
            resync.cancel()
            asked.cancel()
            await asyncio.gather(resync, asked, return_exceptions=True)

    def _ask(self, session: str, have: object) -> asyncio.Task[ChangeReply]:
        async def ask() -> ChangeReply:
            return cast("ChangeReply", await self._call("changes", session, have, _POLL_S, timeout_s=_POLL_S + _CALL_S))

        return asyncio.create_task(ask())

    async def _apply(self, answer: ChangeReply) -> None:
        for event in await self._write_chunks(answer["chunks"]):
            self._emit(event)
        for facts in answer["attempts"]:
            self._emit(observed(self._node_id, facts))

    async def _write_chunks(self, chunks: list[Chunk]) -> list[BridgeEvent]:
        """Write chunks; while the store cannot be written, report that and retry."""
        events: list[BridgeEvent] = []
        done, backoff_s, reported = 0, 0.5, ""
        while True:
            written, failure = await self._write(lambda: _write_all(self._replica, chunks[done:], events))  # noqa: B023 -- awaited at once
            done += written
            if failure is None:
                break
            attempt = chunks[done].attempt if done < len(chunks) else ""
            message = storage_error("the store cannot be written", failure).message
            if message != reported:
                self._emit(StoreProblem(attempt=attempt, message=message))
                reported = message
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, _LONGEST_BACKOFF_S)
        if reported:
            self._emit(StoreProblem(attempt="", message=""))
        return _latest_sizes(events)

    async def _write(self, work: Callable[[], _Result]) -> _Result:
        async with self._writing:
            return await asyncio.shield(asyncio.to_thread(work))


def _write_all(replica: ReplicaStore, chunks: list[Chunk], events: list[BridgeEvent]) -> tuple[int, OSError | None]:
    """Write chunks in order; return how many were written, and the error that stopped it."""
    done = 0
    try:
        for chunk in chunks:
            events.extend(replica.write(chunk))
            done += 1
        replica.save()
    except OSError as error:
        return done, error
    return done, None


def _latest_sizes(events: list[BridgeEvent]) -> list[BridgeEvent]:
    """Keep only the last size of each growing file."""
    last: Mapping[tuple[str, str], int] = {
        (event.attempt, event.path): index for index, event in enumerate(events) if isinstance(event, Grew)
    }
    return [
        event
        for index, event in enumerate(events)
        if not isinstance(event, Grew) or last[event.attempt, event.path] == index
    ]
