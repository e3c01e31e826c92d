"""The conversation with one host about its environment: look, gather and push what is missing, make."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from raylaunch.cluster import installer
from raylaunch.cluster.installer.words import File
from raylaunch.cluster.pins import WheelPlatform, installed_version
from raylaunch.cluster.plan import Step
from raylaunch.cluster.resolving import IndexUnreachableError, Wheel
from raylaunch.cluster.scripts import Script
from raylaunch.cluster.ssh import Machine
from raylaunch.cluster.ssh_files import PushFile, push
from raylaunch.cluster.wanted import Wanted
from raylaunch.cluster.wheels import WheelStore
from raylaunch.errors import HostError, HostStepError, HostStorageError, RaylaunchError, TransferError, from_wire

OnStep = Callable[[Step], None]

LOOK_S = 120.0
MAKE_S = 2400.0
_IMPORTS = ("ray", "wandb", "raylaunch.cluster.on_host")
_RESERVE = 3.0
"""What an environment takes on the disk, in sizes of its wheels: they are kept, and unpacked to twice that."""
_LAST_LINES = 12
_MB = 1_000_000
_MODE = 0o600
_TELL_EVERY_S = 1.0

_PACKAGE = "raylaunch.cluster.installer"
_MODULES = ("words", "index_settings", "named", "look", "programs", "make", "beside", "program")

LOADER = """
import json, sys, types
order = json.load(sys.stdin)
for name, text in order["modules"]:
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    exec(compile(text, name, "exec"), module.__dict__)
sys.exit(module.main(order["request"]))
"""
"""Runs modules that come on stdin, under their own names and in order: the host has none of our files yet."""


class _Looked(BaseModel):
    python: str = ""
    wheels: str = ""
    have: frozenset[str] = frozenset()
    free_bytes: int = 0


class _Made(BaseModel):
    python: str


class _Answer(BaseModel):
    """One line of the installer."""

    model_config = ConfigDict(extra="forbid")

    step: Step | None = None
    error: dict[str, str] | None = None
    result: dict[str, object] | None = None

    @staticmethod
    def read(line: bytes) -> _Answer:
        """Read a line; what is no answer is noise."""
        try:
            return _Answer.model_validate_json(line)
        except ValidationError:
            return _Answer()


class HostInstaller:
    """One host on which an environment is looked for and made: what is known of it, and the steps.

    Args:
        machine: the host.
        command: what runs the loader there.
        wanted: what the environment must hold.
        store: where wheels are gathered here.
        on_step: told each step, and how far it is.
        root: raylaunch's folder on the host.
        limit_bytes_per_s: how much of the link pushing may take.
        facts: further parts of each request.
    """

    def __init__(  # noqa: PLR0913 -- each is one fact
        self,
        machine: Machine,
        command: Sequence[str] | Script,
        wanted: Wanted,
        store: WheelStore,
        on_step: OnStep,
        *,
        root: str,
        limit_bytes_per_s: float | None,
        facts: Mapping[str, object],
    ) -> None:
        self._machine = machine
        self._command = command
        self._wanted = wanted
        self._store = store
        self._tell = on_step
        self._limit = limit_bytes_per_s
        self._root = root
        self._request: dict[str, object] = {
            "root": root,
            "name": wanted.name,
            "versions": dict(wanted.versions),
            "imports": list(_IMPORTS),
            "requirements": list(wanted.requirements),
            **facts,
        }
        self._looked = _Looked()

    async def look(self) -> str:
        """Ask the host what it has; return the environment's Python if that is there."""
        self._looked = _Looked.model_validate(await self._ask("look", limit_s=LOOK_S))
        if self._looked.python:
            self._tell(Step("install", "kept", f"raylaunch {self._wanted.name} is there"))
        return self._looked.python

    async def by_pushing(self, platform: WheelPlatform) -> str:
        """Gather the wheels here, push those that the host has not, and have it install them without any network."""
        wheels = await self._gather(self._wanted.requirements, platform)
        own = self._store.add(self._wanted.own)
        await self._push([*wheels, own])
        files = [_file(one) for one in wheels]
        return await self._make("make", wheels=files, own=_file(own), uv=_file(_uv_of(wheels)))

    async def from_index(self, platform: WheelPlatform) -> str:
        """Push uv and raylaunch's own wheel, and have the host install the rest from its package index."""
        own = self._store.add(self._wanted.own)
        uv: Wheel | None = None
        try:
            uv = _uv_of(await self._gather([f"uv=={installed_version('uv')}"], platform))
        except IndexUnreachableError:
            self._tell(Step("wheels", "note", "no package index can be reached from here: the host must get uv itself"))
        await self._push([own, *([uv] if uv else [])])
        preferences = dict(self._wanted.pins)
        return await self._make("make", preferences=preferences, own=_file(own), uv=_file(uv) if uv else None)

    async def beside(self) -> str:
        """Push raylaunch's own wheel, and have it put beside the named environment."""
        own = self._store.add(self._wanted.own)
        await self._push([own])
        return await self._make("add_beside", own=_file(own))

    async def _gather(self, requirements: Sequence[str], platform: WheelPlatform) -> tuple[Wheel, ...]:
        began = time.monotonic()
        self._tell(Step("wheels", "begins", f"gathers wheels here for {platform}"))

        def told(done: int, total: int) -> None:
            self._tell(Step("wheels", "waits", f"downloaded {_mb(done)} of {_mb(total)}"))

        wheels = await self._store.gather(requirements, platform, preferences=self._wanted.pins, on_bytes=told)
        size = _mb(sum(one.bytes for one in wheels))
        self._tell(Step("wheels", "done", f"has {len(wheels)} wheels here, {size}", time.monotonic() - began))
        return wheels

    async def _push(self, wheels: Sequence[Wheel]) -> None:
        missing = [one for one in wheels if one.sha256 not in self._looked.have]
        total, began = sum(one.bytes for one in missing), time.monotonic()
        if not missing:
            self._tell(Step("push", "kept", f"all {len(wheels)} wheels are there"))
            return
        self._check_room(total)
        self._tell(Step("push", "begins", f"pushes {len(missing)} of {len(wheels)} wheels, {_mb(total)}"))
        await self._push_files(missing, total)
        self._tell(Step("push", "done", f"pushed {len(missing)} wheels, {_mb(total)}", time.monotonic() - began))

    async def _push_files(self, wheels: Sequence[Wheel], total: int) -> None:
        done, told_at = 0, 0.0

        def told(count: int) -> None:
            nonlocal done, told_at
            done += count
            if time.monotonic() - told_at > _TELL_EVERY_S:
                told_at = time.monotonic()
                self._tell(Step("push", "waits", f"pushed {_mb(done)} of {_mb(total)}"))

        folder = self._looked.wheels
        files = [
            PushFile(self._store.path(one), f"{folder}/{one.sha256}/{one.file}", _MODE, one.sha256) for one in wheels
        ]
        try:
            await push(self._machine, files, on_bytes=told, limit_bytes_per_s=self._limit, step="push wheels")
        except TransferError:  # another client pushed the same at the same time, and its file was taken for ours
            await push(self._machine, files, limit_bytes_per_s=self._limit, step="push wheels")

    def _check_room(self, total: int) -> None:
        needed, free = int(total * _RESERVE), self._looked.free_bytes
        if needed > free:
            msg = f"{self._machine.name}: {_mb(free)} are free below {self._root}, and about {_mb(needed)} are needed"
            hint = "free some space there, or set root: to a folder on another disk of that host"
            raise HostStorageError(msg, hint=hint, host=self._machine.name, step="push")

    async def _make(self, verb: str, **facts: object) -> str:
        began, words = time.monotonic(), f"the environment {self._wanted.name}"
        self._tell(Step("install", "begins", f"makes {words}"))
        made = _Made.model_validate(await self._ask(verb, limit_s=MAKE_S, **facts))
        self._tell(Step("install", "done", f"made {words}", time.monotonic() - began))
        return made.python

    async def _ask(self, verb: str, *, limit_s: float, **facts: object) -> object:
        """Send the installer with one request, tell its steps, and return its result."""
        request = json.dumps({**self._request, **facts, "verb": verb})
        body = json.dumps({"modules": _modules(), "request": request}).encode()
        result: object = None
        async with self._machine.lines(self._command, input=body, limit_s=limit_s, step="install") as lines:
            async for line in lines:
                answer = _Answer.read(line)
                if answer.step:
                    self._tell(answer.step)
                if answer.error:
                    raise self._error(answer.error)
                result = answer.result or result
        if result is None:
            said = "".join(
                f"\n    {one}" for one in lines.err.decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
            )
            msg = f"{self._machine.name}: the installer ended without an answer (exit status {lines.status}):{said}"
            hint = "see why above, mend it, and run the same command again"
            raise HostStepError(msg, hint=hint, host=self._machine.name, step="install", exit_status=lines.status)
        return result

    def _error(self, value: Mapping[str, str]) -> RaylaunchError:
        error = from_wire(value["code"], f"{self._machine.name}: {value['message']}", value["hint"])
        if isinstance(error, HostError):
            error.host, error.step = self._machine.name, "install"
        return error


def _modules() -> list[tuple[str, str]]:
    """Return the installer's modules with their text, those that others import first."""
    folder = Path(str(installer.__file__)).parent
    packages = [(_PACKAGE.rsplit(".", count)[0], "") for count in (2, 1, 0)]
    return [*packages, *((f"{_PACKAGE}.{name}", (folder / f"{name}.py").read_text("utf-8")) for name in _MODULES)]


def _file(wheel: Wheel) -> dict[str, str]:
    return asdict(File(wheel.sha256, wheel.file, wheel.name, wheel.version))


def _uv_of(wheels: Sequence[Wheel]) -> Wheel:
    return next(one for one in wheels if one.name == "uv")


def _mb(size: int) -> str:
    return f"{size / _MB:.0f} MB"
