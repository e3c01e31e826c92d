"""Wheels for a host: gathered here for its platform, and pushed if they are missing on the host."""

from __future__ import annotations

import hashlib
import io
import tarfile
import time
from collections.abc import Mapping, Sequence

import anyio.to_thread
from pydantic import BaseModel

from raylaunch.cluster.install.installer_client import OnStep
from raylaunch.cluster.install.platforms import WheelPlatform
from raylaunch.cluster.install.resolve import Wheel
from raylaunch.cluster.install.wheel_store import WheelStore
from raylaunch.cluster.types import Step
from raylaunch.errors import HostStorageError
from raylaunch.paths import storage_errors
from raylaunch.ssh.host import SSHHost
from raylaunch.ssh.push import PushFile, push

_STEP = "push"
_MODE = 0o600
_REPORT_EVERY_S = 1.0
_RESERVE = 3.0
"""Disk space that wheels take, as a multiple of their size: they are kept, and unpacked to twice that."""
_MB = 1_000_000
_SMALL_BYTES = 2 * 1024 * 1024


class InstalledFiles(BaseModel):
    """The environment and wheels that the installer found on a host."""

    python: str = ""
    """The environment's Python; empty if there is none."""
    wheels: str
    """The folder of wheels, each in a folder named by its checksum."""
    have: frozenset[str] = frozenset()
    """The checksums of the wheels on the host."""
    free_bytes: int = 0


class HostWheels:
    """The wheels of one host.

    Args:
        machine: the host.
        store: where wheels are gathered here.
        on_step: called with each step and its progress.
        limit_bytes_per_s: the most bandwidth that pushing may use.
    """

    def __init__(
        self,
        machine: SSHHost,
        store: WheelStore,
        on_step: OnStep,
        *,
        limit_bytes_per_s: float | None,
    ) -> None:
        self._machine = machine
        self._store = store
        self._on_step = on_step
        self._limit = limit_bytes_per_s

    async def gather(
        self, requirements: Sequence[str], platform: WheelPlatform, preferences: Mapping[str, str]
    ) -> tuple[Wheel, ...]:
        """Gather the wheels of all requirements here.

        Raises:
            RaylaunchError: as `WheelStore.gather`.
        """
        began = time.monotonic()
        self._on_step(Step("wheels", "begins", f"gathering wheels here for {platform}"))

        def report(done: int, total: int) -> None:
            of = f" of {mb(total)}" if total else ""
            self._on_step(Step("wheels", "waits", f"downloaded {mb(done)}{of}"))

        wheels = await self._store.gather(requirements, platform, preferences=preferences, on_bytes=report)
        words = f"{len(wheels)} wheels are here, {mb(sum(one.bytes for one in wheels))}"
        self._on_step(Step("wheels", "done", words, time.monotonic() - began))
        return wheels

    async def push(self, wheels: Sequence[Wheel], seen: InstalledFiles) -> str:
        """Push wheels that the host lacks; return the path there of the bundle that holds the small ones, or nothing.

        Small ones are sent in one bundle, which the installer unpacks: each file costs the host some programs and
        writes. Nothing is synced: the installer compares all checksums before it uses a wheel.

        Raises:
            HostError: its disk is too full, or the connection was lost.
            TransferError: a wheel changed on the way.
        """
        missing = [one for one in wheels if one.sha256 not in seen.have]
        total, began = sum(one.bytes for one in missing), time.monotonic()
        if not missing:
            self._on_step(Step(_STEP, "kept", f"all {len(wheels)} wheels are on the host"))
            return ""
        self._check_room(total, seen)
        self._on_step(Step(_STEP, "begins", f"pushing {len(missing)} of {len(wheels)} wheels, {mb(total)}"))
        small = [one for one in missing if one.bytes < _SMALL_BYTES]
        bundle = await anyio.to_thread.run_sync(self._bundle, small, seen.wheels) if len(small) > 1 else None
        alone = [one for one in missing if bundle is None or one not in small]
        files = [
            PushFile(self._store.path(one), f"{seen.wheels}/{one.sha256}/{one.file}", _MODE, one.sha256, durable=False)
            for one in alone
        ]
        await self._push([*files, *([bundle] if bundle else [])], total)
        self._on_step(Step(_STEP, "done", f"pushed {len(missing)} wheels, {mb(total)}", time.monotonic() - began))
        return bundle.remote if bundle else ""

    def _check_room(self, total: int, seen: InstalledFiles) -> None:
        needed = int(total * _RESERVE)
        if needed > seen.free_bytes:
            name, free = self._machine.name, mb(seen.free_bytes)
            msg = f"{name}: {free} are free on the disk of {seen.wheels}, and about {mb(needed)} are needed"
            hint = "free some space there, or set root: to a folder on another disk of that host"
            raise HostStorageError(msg, hint=hint, host=name, step=_STEP)

    async def _push(self, files: Sequence[PushFile], total: int) -> None:
        done, reported_at = 0, 0.0

        def report(count: int) -> None:
            nonlocal done, reported_at
            done += count
            if time.monotonic() - reported_at > _REPORT_EVERY_S:
                reported_at = time.monotonic()
                self._on_step(Step(_STEP, "waits", f"pushed {mb(min(done, total))} of {mb(total)}"))

        await push(self._machine, files, on_bytes=report, limit_bytes_per_s=self._limit, step="push wheels")

    def _bundle(self, wheels: Sequence[Wheel], folder: str) -> PushFile:
        """Pack wheels into one file; the same wheels give the same bytes."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for wheel in sorted(wheels, key=lambda one: one.sha256):
                member = tarfile.TarInfo(f"{wheel.sha256}/{wheel.file}")
                with storage_errors(self._store.path(wheel)):
                    content = self._store.path(wheel).read_bytes()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        sha256 = hashlib.sha256(buffer.getbuffer()).hexdigest()
        return PushFile(buffer.getvalue(), f"{folder}/.bundle-{sha256[:16]}", _MODE, sha256, durable=False)


def mb(size: int) -> str:
    """Format a size for people."""
    return f"{size / _MB:.0f} MB"
