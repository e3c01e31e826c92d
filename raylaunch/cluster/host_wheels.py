"""Wheels on their way to a host: gathered here for its platform, and pushed as far as they are missing there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import anyio
from pydantic import BaseModel

from raylaunch.cluster.installer_call import Interpreter, OnStep
from raylaunch.cluster.pins import WheelPlatform
from raylaunch.cluster.plan import Step
from raylaunch.cluster.resolving import Wheel
from raylaunch.cluster.ssh import Machine
from raylaunch.cluster.ssh_files import PushFile, push
from raylaunch.cluster.ssh_talk import Talk, step_error
from raylaunch.cluster.wheels import WheelStore
from raylaunch.errors import HostStorageError

PUSH_S = 6 * 3600.0
_STEP = "push"
_MODE = 0o600
_BEAT_S = 5.0
_PATIENCE_S = 60.0
_TELL_EVERY_S = 1.0
_RESERVE = 3.0
"""What wheels take on the disk, in sizes of theirs: they are kept, and unpacked to twice that."""
_MB = 1_000_000

HOLD = """
import fcntl, json, os, select, time
folder, patience_s = json.loads(os.read(0, 65536))
os.makedirs(folder, mode=0o700, exist_ok=True)
lock = open(os.path.join(folder, ".lock"), "a")
while True:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except BlockingIOError:
        print("waits", flush=True)
        time.sleep(0.5)
print("holds", flush=True)
while select.select([0], [], [], patience_s)[0] and os.read(0, 4096):
    pass
"""
"""Holds the lock of the host's wheels until its stdin ends, or says nothing any more: where a link is cut, the host may
not notice for hours. Two clients that pushed the same file would take each other's half of it for their own.
"""


class Seen(BaseModel):
    """What the installer saw on a host."""

    python: str = ""
    """Of the environment, if that is there."""
    wheels: str
    """The folder of wheels; each in a folder named by its checksum."""
    have: frozenset[str] = frozenset()
    """The checksums of those that are there."""
    free_bytes: int = 0


class HostWheels:
    """The wheels of one host.

    Args:
        machine: the host.
        interpreter: a Python there.
        store: where wheels are gathered here.
        on_step: told each step, and how far it is.
        limit_bytes_per_s: how much of the link pushing may take.
    """

    def __init__(
        self,
        machine: Machine,
        interpreter: Interpreter,
        store: WheelStore,
        on_step: OnStep,
        *,
        limit_bytes_per_s: float | None,
    ) -> None:
        self._machine = machine
        self._interpreter = interpreter
        self._store = store
        self._tell = on_step
        self._limit = limit_bytes_per_s

    async def gather(
        self, requirements: Sequence[str], platform: WheelPlatform, preferences: Mapping[str, str]
    ) -> tuple[Wheel, ...]:
        """Have the wheels of everything that is required here.

        Raises:
            RaylaunchError: as `WheelStore.gather`.
        """
        began = time.monotonic()
        self._tell(Step("wheels", "begins", f"gathers wheels here for {platform}"))

        def told(done: int, total: int) -> None:
            of = f" of {mb(total)}" if total else ""
            self._tell(Step("wheels", "waits", f"downloaded {mb(done)}{of}"))

        wheels = await self._store.gather(requirements, platform, preferences=preferences, on_bytes=told)
        words = f"has {len(wheels)} wheels here, {mb(sum(one.bytes for one in wheels))}"
        self._tell(Step("wheels", "done", words, time.monotonic() - began))
        return wheels

    async def push(self, wheels: Sequence[Wheel], seen: Seen) -> None:
        """Have wheels on the host that are gathered here.

        Raises:
            HostError: its disk has no room, or it was lost.
            TransferError: what arrived is not what was sent.
        """
        missing = [one for one in wheels if one.sha256 not in seen.have]
        total, began = sum(one.bytes for one in missing), time.monotonic()
        if not missing:
            self._tell(Step(_STEP, "kept", f"all {len(wheels)} wheels are there"))
            return
        self._check_room(total, seen)
        self._tell(Step(_STEP, "begins", f"pushes {len(missing)} of {len(wheels)} wheels, {mb(total)}"))
        async with self._alone(seen.wheels):
            await self._push(missing, seen.wheels, total)
        self._tell(Step(_STEP, "done", f"pushed {len(missing)} wheels, {mb(total)}", time.monotonic() - began))

    def _check_room(self, total: int, seen: Seen) -> None:
        needed = int(total * _RESERVE)
        if needed > seen.free_bytes:
            name, free = self._machine.name, mb(seen.free_bytes)
            msg = f"{name}: {free} are free where {seen.wheels} is, and about {mb(needed)} are needed"
            hint = "free some space there, or set root: to a folder on another disk of that host"
            raise HostStorageError(msg, hint=hint, host=name, step=_STEP)

    @contextlib.asynccontextmanager
    async def _alone(self, folder: str) -> AsyncIterator[None]:
        """Hold the lock of the host's wheels; wait while another client pushes."""
        async with self._machine.talk(self._interpreter.runs(HOLD), limit_s=PUSH_S, step=_STEP) as talk:
            await talk.send(json.dumps([folder, _PATIENCE_S]).encode() + b"\n")
            await self._wait_for_lock(talk)
            beating = asyncio.ensure_future(_beat(talk))
            try:
                yield
            finally:
                beating.cancel()
            talk.close_input()
            async for _ in talk.chunks():
                pass
            await talk.end()

    async def _wait_for_lock(self, talk: Talk) -> None:
        told_at = time.monotonic()
        printed = b""
        async for data in talk.chunks():
            printed += data
            if b"holds" in printed:
                return
            if time.monotonic() - told_at > _TELL_EVERY_S:
                told_at = time.monotonic()
                self._tell(Step(_STEP, "waits", "waits for another client that pushes to the same host"))
        status, err = await talk.end()
        raise step_error(self._machine.name, _STEP, status, printed, err)

    async def _push(self, wheels: Sequence[Wheel], folder: str, total: int) -> None:
        done, told_at = 0, 0.0

        def told(count: int) -> None:
            nonlocal done, told_at
            done += count
            if time.monotonic() - told_at > _TELL_EVERY_S:
                told_at = time.monotonic()
                self._tell(Step(_STEP, "waits", f"pushed {mb(done)} of {mb(total)}"))

        files = [
            PushFile(self._store.path(one), f"{folder}/{one.sha256}/{one.file}", _MODE, one.sha256) for one in wheels
        ]
        await push(self._machine, files, on_bytes=told, limit_bytes_per_s=self._limit, step="push wheels")


async def _beat(talk: Talk) -> None:
    while True:
        await anyio.sleep(_BEAT_S)
        await talk.send(b"\n")


def mb(size: int) -> str:
    """Return a size as people read it."""
    return f"{size / _MB:.0f} MB"
