"""Whether the Ray of a job's environment is compatible with the cluster's.

Driver and workers speak Ray's inner protocol: only the same Ray, under the same minor version of Python, may join.
Checked in the prepared environment, before the training starts.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from raylaunch.contract import EnvironmentSpec

_MINOR = re.compile(r"(\d+)\.(\d+)")


class RayVersions(NamedTuple):
    """Of Python and Ray; empty where it is not known. ``none`` is a Ray that is not there."""

    python: str
    ray: str


class Mismatch(NamedTuple):
    """What does not match, and the command that fixes it."""

    what: str
    fix: str


NO_RAY = "none"


def of_cluster() -> RayVersions:
    """Return the versions of the interpreter that runs this, which is the one that runs Ray on this node."""
    try:
        return RayVersions(platform.python_version(), importlib.metadata.version("ray"))
    except importlib.metadata.PackageNotFoundError:
        return RayVersions(platform.python_version(), "")


def mismatch(found: RayVersions, needed: RayVersions, environment: EnvironmentSpec, python: str) -> Mismatch | None:
    """Return what does not match, or None.

    Args:
        found: what the job's environment has.
        needed: what the cluster has.
        environment: the job's.
        python: its interpreter.
    """
    minor, theirs = _minor(needed.python), _minor(found.python)
    wanted = f"ray[default]=={needed.ray}"
    if found.python and needed.python and minor != theirs:
        what = f"launcher: ray needs Python {minor}, like the cluster, but {python} is Python {found.python}"
        return Mismatch(what, _python_fix(environment, minor, wanted, python))
    if found.ray and needed.ray and found.ray != needed.ray:
        has = "has no Ray" if found.ray == NO_RAY else f"has Ray {found.ray}"
        what = f"launcher: ray needs Ray {needed.ray}, like the cluster, but {python} {has}"
        return Mismatch(what, _ray_fix(environment, wanted, python))
    return None


def _ray_fix(environment: EnvironmentSpec, wanted: str, python: str) -> str:
    kind = environment["kind"]
    if kind == "uv":
        return f"uv add '{wanted}', then submit again"
    if kind == "pip":
        return f"add {wanted} to its requirements"
    return f"uv pip install --python {python} '{wanted}'"


def _python_fix(environment: EnvironmentSpec, minor: str, wanted: str, python: str) -> str:
    kind, value = environment["kind"], environment["value"]
    if kind == "uv":
        return f"uv python pin {minor} && uv lock, then submit again"
    if kind == "conda":
        return f"conda create -n {value}-py{minor} python={minor}, and in it: pip install '{wanted}'"
    place = value if kind == "venv" else str(Path(python).parent.parent)
    return f"uv venv --python {minor} {place}-py{minor} && uv pip install --python {place}-py{minor} '{wanted}'"


def _minor(version: str) -> str:
    found = _MINOR.match(version)
    return found.group() if found else version
