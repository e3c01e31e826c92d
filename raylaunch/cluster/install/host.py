"""One host's environment, step by step: look, gather and push what is missing, make."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict

from pydantic import BaseModel

from raylaunch.cluster.install.call import STEP, Interpreter, OnStep, ask_installer
from raylaunch.cluster.install.host_wheels import HostWheels, Seen
from raylaunch.cluster.install.pins import WheelPlatform, installed_version
from raylaunch.cluster.install.resolving import IndexUnreachableError, Wheel
from raylaunch.cluster.install.wanted import Wanted
from raylaunch.cluster.install.wheels import WheelStore
from raylaunch.cluster.installer.words import File
from raylaunch.cluster.plan import Step
from raylaunch.cluster.ssh.machine import Machine
from raylaunch.errors import TransferError

LOOK_S = 120.0
MAKE_S = 2400.0
_IMPORTS = ("ray", "wandb", "raylaunch.cluster.on_host")


class _Made(BaseModel):
    python: str


class HostInstaller:
    """One host on which an environment is looked for and made: what is known of it, and the steps.

    Args:
        machine: the host.
        interpreter: the Python from which, or beside which, the environment is made.
        wanted: what it must hold.
        store: where wheels are gathered here.
        on_step: told each step, and how far it is.
        root: raylaunch's folder on the host.
        limit_bytes_per_s: how much of the link pushing may take.
        platform: what the interpreter runs on; None for an environment that the user names.
    """

    def __init__(  # noqa: PLR0913 -- each is one fact
        self,
        machine: Machine,
        interpreter: Interpreter,
        wanted: Wanted,
        store: WheelStore,
        on_step: OnStep,
        *,
        root: str,
        limit_bytes_per_s: float | None,
        platform: WheelPlatform | None = None,
    ) -> None:
        self._machine = machine
        self._interpreter = interpreter
        self._wanted = wanted
        self._store = store
        self._tell = on_step
        self._wheels = HostWheels(machine, store, on_step, limit_bytes_per_s=limit_bytes_per_s)
        self._seen = Seen(wheels="")
        self._request: dict[str, object] = {
            "root": root,
            "name": wanted.name,
            "versions": dict(wanted.versions),
            "imports": list(_IMPORTS),
            "requirements": list(wanted.requirements),
            "named": platform is None,
            "arch": platform.arch if platform else "",
            "minor": platform.minor if platform else "",
        }

    async def look(self) -> str:
        """Ask the host what it has; return the environment's Python if that is there."""
        self._seen = Seen.model_validate(await self._ask("look", limit_s=LOOK_S))
        if self._seen.python:
            self._tell(Step(STEP, "kept", f"raylaunch {self._wanted.name} is there"))
        return self._seen.python

    async def by_pushing(self, platform: WheelPlatform) -> str:
        """Gather the wheels here, push those that the host has not, and have it install them without any network."""
        wheels = await self._wheels.gather(self._wanted.requirements, platform, self._wanted.pins)
        own = self._store.add(self._wanted.own)
        uv = next(one for one in wheels if one.name == "uv")
        files = {"wheels": [_file(one) for one in wheels], "own": _file(own), "uv": _file(uv)}
        try:
            return await self._make("make", bundle=await self._wheels.push([*wheels, own], self._seen), **files)
        except TransferError as error:  # damaged ones are removed there, and pushed anew
            self._tell(Step(STEP, "note", error.message))
            await self.look()
            return await self._make("make", bundle=await self._wheels.push([*wheels, own], self._seen), **files)

    async def from_index(self, platform: WheelPlatform) -> str:
        """Push uv and raylaunch's own wheel, and have the host install the rest from its package index."""
        own = self._store.add(self._wanted.own)
        tools: tuple[Wheel, ...] = ()
        try:
            tools = await self._wheels.gather([f"uv=={installed_version('uv')}"], platform, {})
        except IndexUnreachableError:
            words = "no package index can be reached from here: the host must have uv, or get it itself"
            self._tell(Step("wheels", "note", words))
        bundle = await self._wheels.push([own, *tools], self._seen)
        uv = _file(tools[0]) if tools else None
        preferences = dict(self._wanted.pins)
        return await self._make("make", bundle=bundle, preferences=preferences, own=_file(own), uv=uv)

    async def beside(self) -> str:
        """Push raylaunch's own wheel, and have it put beside the named environment."""
        own = self._store.add(self._wanted.own)
        bundle = await self._wheels.push([own], self._seen)
        return await self._make("add_beside", bundle=bundle, own=_file(own))

    async def _make(self, verb: str, **facts: object) -> str:
        began, words = time.monotonic(), f"the environment {self._wanted.name}"
        self._tell(Step(STEP, "begins", f"makes {words}"))
        made = _Made.model_validate(await self._ask(verb, limit_s=MAKE_S, **facts))
        self._tell(Step(STEP, "done", f"made {words}", time.monotonic() - began))
        return made.python

    async def _ask(self, verb: str, *, limit_s: float, **facts: object) -> Mapping[str, object]:
        request = {**self._request, **facts, "verb": verb}
        return await ask_installer(self._machine, self._interpreter, request, limit_s=limit_s, on_step=self._tell)


def _file(wheel: Wheel) -> dict[str, str]:
    return asdict(File(wheel.sha256, wheel.file, wheel.name, wheel.version))
