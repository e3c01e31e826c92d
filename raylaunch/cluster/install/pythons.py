"""Which Python each host's environment is made from. Ray wants the same minor version on all nodes. Pure functions."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping

from raylaunch.cluster.install.pins import HostPython, WheelPlatform
from raylaunch.cluster.probe.facts import HostFacts, Python
from raylaunch.errors import ClusterStartError

OLDEST, NEWEST = (3, 10), (3, 14)


def usable(facts: HostFacts) -> dict[tuple[int, int], Python]:
    """Return the Pythons of a host from which an environment can be made, the first found of each minor version."""
    found: dict[tuple[int, int], Python] = {}
    for python in facts.pythons:
        fits = OLDEST <= python.minor <= NEWEST and python.cpython and python.final and not python.free_threaded
        if fits and not python.in_environment:
            found.setdefault(python.minor, python)
    return found


def choose(
    facts: Mapping[str, HostFacts],
    *,
    own: tuple[int, int] = sys.version_info[:2],
    beside: Collection[tuple[int, int]] = (),
) -> dict[str, HostPython]:
    """Return by host the Python to take: of one minor version on all, this machine's own where all have that.

    Args:
        facts: of the hosts that are to have an environment of ours.
        own: this machine's.
        beside: the versions of environments that hosts of the same cluster bring themselves.

    Raises:
        ClusterStartError: there is no minor version that all of them have.
    """
    by_host = {host: usable(one) for host, one in facts.items()}
    common = set.intersection(*(set(one) for one in by_host.values()), *({one} for one in beside)) if by_host else set()
    if by_host and not common:
        has = "; ".join(f"{host} has {_words(one)}" for host, one in by_host.items())
        msg = f"the hosts have no Python in common, and Ray wants the same minor version on all: {has}"
        hint = "install one on those that lack it (without root: uv python install 3.12, or a conda environment)"
        raise ClusterStartError(msg, hint=hint, step="python")
    minor = own if own in common else max(common, default=own)
    return {host: _host_python(facts[host], one[minor]) for host, one in by_host.items()}


def _words(pythons: Mapping[tuple[int, int], Python]) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in sorted(pythons)) or "none from 3.10 to 3.14"


def _host_python(facts: HostFacts, python: Python) -> HostPython:
    glibc = ".".join(str(part) for part in facts.glibc or (0, 0))
    return HostPython(path=python.path, platform=WheelPlatform(arch=facts.arch, glibc=glibc, python=python.version))
