"""What a host's environment must hold, computed from what is installed here; and so its name. No network is needed."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from raylaunch.cluster.install.own_wheel import OwnWheel
from raylaunch.cluster.install.pins import EXACT, WheelPlatform, exact_requirements, installed_pins, installed_version
from raylaunch.version import __version__

_DIGITS = 12


@dataclass(frozen=True)
class Wanted:
    """All that decides what is in a host's environment, and so its name."""

    own: OwnWheel
    requirements: tuple[str, ...]
    """What is needed beside raylaunch, `EXACT` pinned."""
    pins: Mapping[str, str]
    """The versions that are installed here, preferred on the host."""
    versions: Mapping[str, str]
    """Of raylaunch and of `EXACT`: these must be exactly so."""
    place: tuple[str, ...]
    """Of the host: its platform and Python, or the path of the environment that the user names."""

    @property
    def name(self) -> str:
        """Return the environment's name."""
        facts = [self.own.digest, self.requirements, sorted(self.pins.items()), self.place]
        return f"{__version__}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:_DIGITS]}"


def wanted_on(own: OwnWheel, platform: WheelPlatform) -> Wanted:
    """Say what an environment of our own for that platform must hold.

    Raises:
        VersionError: Ray or wandb is not installed here, or there is none for that platform.
    """
    requirements = exact_requirements(own.requirements)
    place = (platform.uv_name, platform.glibc, platform.minor)
    return Wanted(own, requirements, _pins(requirements, platform), _versions(), place)


@functools.lru_cache
def _pins(requirements: tuple[str, ...], platform: WheelPlatform) -> Mapping[str, str]:
    """Walk once for all hosts that are alike; what is installed here does not change under a running process.

    Never in a thread: CPython 3.11 before 3.11.8 may raise SystemError where two parse markers at once (gh-106905).
    """
    return installed_pins(requirements, platform)


def wanted_beside(own: OwnWheel, environment: str) -> Wanted:
    """Say what must be beside and in an environment of a host that the user names."""
    return Wanted(own, exact_requirements(own.requirements), {}, _versions(), (environment,))


def _versions() -> dict[str, str]:
    return {"raylaunch": __version__, **{name: installed_version(name) for name in EXACT}}
