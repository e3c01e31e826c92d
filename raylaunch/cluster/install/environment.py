"""One host's environment: what it must contain, and the steps to check it, push wheels and make it."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic import BaseModel

from raylaunch.cluster.install.installer_client import STEP, Interpreter, OnStep, ask_installer
from raylaunch.cluster.install.platforms import (
    EXACT,
    HostPython,
    WheelPlatform,
    exact_requirements,
    installed_pins,
    installed_version,
)
from raylaunch.cluster.install.resolve import IndexUnreachableError, Wheel
from raylaunch.cluster.install.wheel_push import HostWheels, InstalledFiles
from raylaunch.cluster.install.wheel_store import OwnWheel, WheelStore
from raylaunch.cluster.installer.protocol import File
from raylaunch.cluster.types import Step
from raylaunch.errors import HostStepError, TransferError
from raylaunch.ssh.host import SSHHost
from raylaunch.version import __version__

_DIGITS = 12


@dataclass(frozen=True)
class EnvironmentSource:
    """Everything that decides the content of a host's environment, and so its name."""

    own: OwnWheel
    requirements: tuple[str, ...]
    """Requirements in addition to raylaunch, `EXACT` pinned."""
    pins: Mapping[str, str]
    """The versions installed here, preferred on the host."""
    versions: Mapping[str, str]
    """Of raylaunch and of `EXACT`: these must match exactly."""
    place: tuple[str, ...]
    """Of the host: its platform and Python, or the path of the environment that the user names."""

    @property
    def name(self) -> str:
        """Return the environment's name."""
        facts = [self.own.digest, self.requirements, sorted(self.pins.items()), self.place]
        return f"{__version__}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:_DIGITS]}"


def wanted_on(own: OwnWheel, platform: WheelPlatform) -> EnvironmentSource:
    """Return the content of an environment for that platform.

    Raises:
        VersionError: Ray or wandb is not installed here, or there is none for that platform.
    """
    requirements = exact_requirements(own.requirements)
    place = (platform.uv_name, platform.glibc, platform.minor)
    return EnvironmentSource(own, requirements, _pins(requirements, platform), _versions(), place)


@functools.lru_cache
def _pins(requirements: tuple[str, ...], platform: WheelPlatform) -> Mapping[str, str]:
    """Walk once for all hosts that are alike; what is installed here does not change under a running process.

    Never in a thread: CPython 3.11 before 3.11.8 may raise SystemError where two parse markers at once (gh-106905).
    """
    return installed_pins(requirements, platform)


def wanted_beside(own: OwnWheel, environment: str) -> EnvironmentSource:
    """Return the content of an environment that the user names, and of ours next to it."""
    return EnvironmentSource(own, exact_requirements(own.requirements), {}, _versions(), (environment,))


def _versions() -> dict[str, str]:
    return {"raylaunch": __version__, **{name: installed_version(name) for name in EXACT}}


LOOK_S = 120.0
MAKE_S = 2400.0
_IMPORTS = ("ray", "wandb", "raylaunch.cluster.on_host")


class _Made(BaseModel):
    python: str


class HostInstaller:
    """The steps that check and make the environment of one host.

    Args:
        machine: the host.
        interpreter: the Python from which, or next to which, the environment is made.
        wanted: its content.
        store: where wheels are gathered here.
        on_step: called with each step and its progress.
        root: raylaunch's folder on the host.
        limit_bytes_per_s: the most bandwidth that pushing may use.
        platform: what the interpreter runs on; None for an environment that the user names.
    """

    def __init__(  # noqa: PLR0913 -- each is one fact
        self,
        machine: SSHHost,
        interpreter: Interpreter,
        wanted: EnvironmentSource,
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
        self._on_step = on_step
        self._wheels = HostWheels(machine, store, on_step, limit_bytes_per_s=limit_bytes_per_s)
        self._seen = InstalledFiles(wheels="")
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
        """Check what the host has; return the environment's Python if it exists."""
        self._seen = InstalledFiles.model_validate(await self._ask("look", limit_s=LOOK_S))
        if self._seen.python:
            self._on_step(Step(STEP, "kept", f"raylaunch {self._wanted.name} is installed"))
        return self._seen.python

    async def by_pushing(self, platform: WheelPlatform) -> str:
        """Gather the wheels here, push those that the host lacks, and install them there without any network."""
        wheels = await self._wheels.gather(self._wanted.requirements, platform, self._wanted.pins)
        own = self._store.add(self._wanted.own)
        uv = next(one for one in wheels if one.name == "uv")
        files = {"wheels": [_file(one) for one in wheels], "own": _file(own), "uv": _file(uv)}
        try:
            return await self._make("make", bundle=await self._wheels.push([*wheels, own], self._seen), **files)
        except TransferError as error:  # damaged ones are removed there, and pushed again
            self._on_step(Step(STEP, "note", error.message))
            await self.look()
            return await self._make("make", bundle=await self._wheels.push([*wheels, own], self._seen), **files)

    async def from_index(self, platform: WheelPlatform) -> str:
        """Push uv and raylaunch's own wheel, and install the rest there from the host's package index."""
        own = self._store.add(self._wanted.own)
        tools: tuple[Wheel, ...] = ()
        try:
            tools = await self._wheels.gather([f"uv=={installed_version('uv')}"], platform, {})
        except IndexUnreachableError:
            words = "no package index can be reached from here: the host must have uv, or fetch it itself"
            self._on_step(Step("wheels", "note", words))
        bundle = await self._wheels.push([own, *tools], self._seen)
        uv = _file(tools[0]) if tools else None
        preferences = dict(self._wanted.pins)
        return await self._make("make", bundle=bundle, preferences=preferences, own=_file(own), uv=uv)

    async def beside(self) -> str:
        """Push raylaunch's own wheel, and install it next to the named environment."""
        own = self._store.add(self._wanted.own)
        bundle = await self._wheels.push([own], self._seen)
        return await self._make("add_beside", bundle=bundle, own=_file(own))

    async def _make(self, verb: str, **facts: object) -> str:
        began, words = time.monotonic(), f"the environment {self._wanted.name}"
        self._on_step(Step(STEP, "begins", f"making {words}"))
        made = _Made.model_validate(await self._ask(verb, limit_s=MAKE_S, **facts))
        self._on_step(Step(STEP, "done", f"made {words}", time.monotonic() - began))
        return made.python

    async def _ask(self, verb: str, *, limit_s: float, **facts: object) -> Mapping[str, object]:
        request = {**self._request, **facts, "verb": verb}
        return await ask_installer(self._machine, self._interpreter, request, limit_s=limit_s, on_step=self._on_step)


def _file(wheel: Wheel) -> dict[str, str]:
    return asdict(File(wheel.sha256, wheel.file, wheel.name, wheel.version))


ROOT = "~/.raylaunch"


async def ensure_environment(  # noqa: PLR0913 -- all keywords, each with a sentence
    machine: SSHHost,
    python: HostPython,
    *,
    store: WheelStore,
    index_reachable: bool = False,
    root: str = ROOT,
    limit_bytes_per_s: float | None = None,
    on_step: OnStep,
) -> str:
    """Make sure that a host has this raylaunch's environment; return the path of its Python there.

    Args:
        machine: the host.
        python: its interpreter, and what it runs on.
        store: where wheels are gathered here.
        index_reachable: whether the host reaches a package index, and so installs from it. Otherwise, or if that
            fails, wheels are gathered here and pushed.
        root: raylaunch's folder on the host.
        limit_bytes_per_s: the most bandwidth that pushing may use.
        on_step: called with each step and its progress.

    Raises:
        HostError: the host cannot be used as it is, a step failed there, or it was lost.
        ClusterStartError: what it needs cannot be downloaded here.
        VersionError: what it needs does not exist for its platform.
        StorageError: the disk here is full.
    """
    wanted = wanted_on(store.own, python.platform)
    host = HostInstaller(
        machine,
        Interpreter(python.path),
        wanted,
        store,
        on_step,
        root=root,
        limit_bytes_per_s=limit_bytes_per_s,
        platform=python.platform,
    )
    if ready := await host.look():
        return ready
    if not index_reachable:
        return await host.by_pushing(python.platform)
    try:
        return await host.from_index(python.platform)
    except HostStepError as error:
        words = f"installing from the host's package index failed, pushing wheels instead: {error.message}"
        on_step(Step(STEP, "note", words))
        return await host.by_pushing(python.platform)


async def ensure_beside(  # noqa: PLR0913 -- as above
    machine: SSHHost,
    environment: str,
    *,
    store: WheelStore,
    root: str = ROOT,
    limit_bytes_per_s: float | None = None,
    on_step: OnStep,
) -> str:
    """Check an environment that the user names, and install raylaunch next to it; return a Python that sees both.

    Args:
        machine: the host.
        environment: a virtual or conda environment there, or the interpreter of one.
        store: where wheels are gathered here.
        root: raylaunch's folder on the host.
        limit_bytes_per_s: the most bandwidth that pushing may use.
        on_step: called with each step.

    Raises:
        VersionError: it does not hold what is needed; the hint is the command that fixes it.
        HostError: it cannot be used, a step failed on the host, or it was lost.
    """
    wanted = wanted_beside(store.own, environment)
    interpreter = Interpreter(environment, named=True)
    host = HostInstaller(machine, interpreter, wanted, store, on_step, root=root, limit_bytes_per_s=limit_bytes_per_s)
    return await host.look() or await host.beside()
