"""A host's platform and Python, and the versions that it should have: those installed here, if they fit."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterable
from dataclasses import dataclass
from email.parser import HeaderParser
from functools import cached_property

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name

from raylaunch.errors import VersionError

EXACT = ("ray", "wandb")
"""Never another version than the client's."""

_ARCHITECTURES = ("x86_64", "aarch64")
_OLDEST_GLIBC = 17
_KNOWN_TO_UV = (17, 28, *range(31, 41))  # `uv pip compile --help`, --python-platform
_LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # PEP 600
_FIRST_MANYLINUX = 5
_ONLY_EXTRA = re.compile(r"^[^;]*;(?:(?! or ).)*\bextra *== *['\"](?:(?! or ).)*$")  # most; not worth parsing


@dataclass(frozen=True)
class WheelPlatform:
    """A host's architecture, C library and Python (CPython), which decide which wheels fit."""

    arch: str
    """As ``uname -m`` says: ``x86_64`` or ``aarch64``."""
    glibc: str
    """Its version, as ``2.35``."""
    python: str
    """Its full version, as ``3.10.12``."""

    def __str__(self) -> str:
        return f"Python {self.minor} on Linux {self.arch} with glibc {self.glibc}"

    @cached_property
    def minor(self) -> str:
        """Return Python's version without the last number."""
        return ".".join(self.python.split(".")[:2])

    @property
    def uv_name(self) -> str:
        """Return uv's name of the platform.

        Raises:
            VersionError: Ray has no wheels for it.
        """
        release = self._glibc_release()
        fitting = [known for known in _KNOWN_TO_UV if known <= release]
        if self.arch not in _ARCHITECTURES or not fitting:
            msg = f"there is no Ray for {self}"
            hint = f"it is made for {' and '.join(_ARCHITECTURES)} with glibc 2.{_OLDEST_GLIBC} or newer"
            raise VersionError(msg, hint=hint)
        return f"{self.arch}-manylinux_2_{fitting[-1]}"

    @cached_property
    def platforms(self) -> tuple[str, ...]:
        """Return the platform tags of wheels that fit, best first."""
        names: list[str] = []
        for release in range(self._glibc_release(), _FIRST_MANYLINUX - 1, -1):
            names.append(f"manylinux_2_{release}_{self.arch}")
            if release in _LEGACY:
                names.append(f"{_LEGACY[release]}_{self.arch}")
        return (*names, f"linux_{self.arch}")

    @cached_property
    def tags(self) -> dict[Tag, int]:
        """Return the tags of wheels that fit, with their rank; the smaller the better."""
        major, minor = (int(part) for part in self.minor.split("."))
        version, abi = (major, minor), f"cp{major}{minor}"
        found = [
            *cpython_tags(version, abis=[abi], platforms=self.platforms),
            *compatible_tags(version, abi, self.platforms),
        ]
        return {tag: rank for rank, tag in reversed(list(enumerate(found)))}

    def markers(self) -> dict[str, str]:
        """Return the values of environment markers there (PEP 508)."""
        return {
            "implementation_name": "cpython",
            "implementation_version": self.python,
            "os_name": "posix",
            "platform_machine": self.arch,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": self.python,
            "python_version": self.minor,
            "sys_platform": "linux",
        }

    def _glibc_release(self) -> int:
        found = re.match(r"2\.(\d+)", self.glibc)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class HostPython:
    """The interpreter on a host from which an environment is made, and what it runs on."""

    path: str
    platform: WheelPlatform


def exact_requirements(requirements: Iterable[str]) -> tuple[str, ...]:
    """Return the same requirements, those of `EXACT` pinned to what is installed here, extras kept.

    Raises:
        VersionError: one of them is not installed here.
    """
    return tuple(_exact(Requirement(text)) for text in requirements)


def _exact(requirement: Requirement) -> str:
    if canonicalize_name(requirement.name) not in EXACT:
        return str(requirement)
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}=={installed_version(requirement.name)}"


def installed_version(name: str) -> str:
    """Return the version of a package that is installed here.

    Raises:
        VersionError: it is not.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        msg = f"{name} is not installed here, so a host cannot be given the same version"
        raise VersionError(msg, hint=f"install it: pip install {name}") from None


def installed_pins(requirements: Iterable[str], platform: WheelPlatform) -> dict[str, str]:
    """Return name and version of installed packages that the requirements need, directly or not, on that platform.

    A package that only that platform needs (a backport for an older Python) is missing.
    """
    markers, pins = platform.markers(), dict[str, str]()
    todo, seen = _applying(requirements, "", markers), set[tuple[str, str]]()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                version, needs = _facts(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            pins[name] = version
            todo += _applying(needs, extra, markers)
    return dict(sorted(pins.items()))


@functools.cache
def _facts(name: str) -> tuple[str, tuple[str, ...]]:
    """Return version and requirements of what is installed here, without parsing the long text behind the header."""
    distribution = importlib.metadata.distribution(name)
    text = distribution.read_text("METADATA")
    if text is None:  # installed by a setuptools of old, which spreads it over several files
        return distribution.version, tuple(distribution.requires or ())
    parsed = HeaderParser().parsestr(text.partition("\n\n")[0])
    return str(parsed["Version"]), tuple(parsed.get_all("Requires-Dist") or ())


def _applying(requirements: Iterable[str], extra: str, markers: dict[str, str]) -> list[Requirement]:
    parsed = [Requirement(text) for text in requirements if extra or not _ONLY_EXTRA.search(text)]
    return [one for one in parsed if one.marker is None or one.marker.evaluate(markers | {"extra": extra})]
