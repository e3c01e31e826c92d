"""Does the Ray of a job's environment fit the cluster's?

Driver and workers speak Ray's inner protocol: only the same Ray, under the same minor version of Python, may join.
Asked when a job is submitted, as far as that can be known then (`runner.pyz --fit`, run by the steward), and once more
before the training starts.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from raylaunch.runner import probe
from raylaunch.runner.builds import EnvironmentProblem, Place
from raylaunch.runner.environment import prepare
from raylaunch.runner.training import without_ray
from raylaunch.runner.watch import Pulse, StopAsked

if TYPE_CHECKING:
    from raylaunch.runner.contract import EnvironmentSpec

OPTION = "--fit"
_LOCKED = re.compile(r'^\[\[package\]\]\nname = "ray"\nversion = "([^"]+)"', re.MULTILINE)
_REQUIRED = re.compile(r"^\s*ray\s*(?:\[[^]]*\])?\s*(?:(==)\s*([\w.!+]+))?", re.MULTILINE | re.IGNORECASE)
_MINOR = re.compile(r"(\d+)\.(\d+)")


class Versions(NamedTuple):
    """Of Python and Ray; empty where it is not known. ``none`` is a Ray that is not there."""

    python: str
    ray: str


class Mismatch(NamedTuple):
    """What does not fit, and the command that mends it."""

    what: str
    mend: str


NO_RAY = "none"


def of_cluster() -> Versions:
    """Return the versions of the interpreter that runs this, which is the one that runs Ray on this node."""
    try:
        return Versions(platform.python_version(), importlib.metadata.version("ray"))
    except importlib.metadata.PackageNotFoundError:
        return Versions(platform.python_version(), "")


def mismatch(found: Versions, needed: Versions, environment: EnvironmentSpec, python: str) -> Mismatch | None:
    """Return what does not fit, or None.

    Args:
        found: what the job's environment has.
        needed: what the cluster has.
        environment: the job's.
        python: its interpreter, or the file that says what will be in it.
    """
    minor, theirs = _minor(needed.python), _minor(found.python)
    wanted = f"ray[default]=={needed.ray}"
    if found.python and needed.python and minor != theirs:
        says = ".python-version says" if environment["kind"] == "uv" else f"{python} is"
        what = f"launcher: ray needs Python {minor}, as the cluster has, and {says} Python {found.python}"
        return Mismatch(what, _other_python(environment, minor, wanted, python))
    if found.ray and needed.ray and found.ray != needed.ray:
        has = "has no Ray" if found.ray == NO_RAY else f"has Ray {found.ray}"
        what = f"launcher: ray needs Ray {needed.ray}, as the cluster has, and {python} {has}"
        return Mismatch(what, _other_ray(environment, wanted, python))
    return None


def _other_ray(environment: EnvironmentSpec, wanted: str, python: str) -> str:
    kind = environment["kind"]
    if kind == "uv":
        return f"uv add '{wanted}', and submit it again"
    if kind == "pip":
        return f"write {wanted} among its requirements"
    return f"uv pip install --python {python} '{wanted}'"


def _other_python(environment: EnvironmentSpec, minor: str, wanted: str, python: str) -> str:
    kind, value = environment["kind"], environment["value"]
    if kind == "uv":
        return f"uv python pin {minor} && uv lock, and submit it again"
    if kind == "conda":
        return f"conda create -n {value}-py{minor} python={minor}, and in it: pip install '{wanted}'"
    place = value if kind == "venv" else str(Path(python).parent.parent)
    return f"uv venv --python {minor} {place}-py{minor} && uv pip install --python {place}-py{minor} '{wanted}'"


def _minor(version: str) -> str:
    found = _MINOR.match(version)
    return found.group() if found else version


# -- what can be known before anything is built ----------------------------------------------------------------------


def of_files(environment: EnvironmentSpec, files: Mapping[str, str]) -> tuple[Versions, str]:
    """Return the versions that a lock file or requirements name, and the file that does.

    Args:
        environment: of the kinds ``uv`` and ``pip``.
        files: texts from the working directory, as far as they are there.
    """
    if environment["kind"] == "uv":
        lock = files.get("uv.lock", "")
        locked = _LOCKED.search(lock)
        ray = locked.group(1) if locked else (NO_RAY if lock else "")
        pinned = _MINOR.match(files.get(".python-version", "").strip().removeprefix("cpython-"))
        return Versions(pinned.group() if pinned else "", ray), "uv.lock"
    text = "\n".join([*environment["requirements"], files.get(environment["value"], "")])
    rays = [match.group(2) for match in _REQUIRED.finditer(text) if match.group(1)]
    return Versions("", rays[0] if len(rays) == 1 else ""), environment["value"] or "its list of requirements"


def of_interpreter(environment: EnvironmentSpec, env: dict[str, str], folder: Path, envs: Path) -> tuple[Versions, str]:
    """Ask an interpreter that is on this node; nothing is known where it is not there, or does not answer."""
    place = Place(folder / "code", folder / "tmp", envs, folder / "setup.log", folder / "wheels")
    for made in (place.code, place.tmp):
        made.mkdir(parents=True, exist_ok=True)
    pulse = Pulse(folder, grace_s=1.0, environ=env)
    try:
        prepared = prepare(environment, env, place=place, pulse=pulse)
        seen = probe.look(prepared, arch="", gpus=0, place=place, pulse=pulse)
    except (EnvironmentProblem, StopAsked, OSError):
        return Versions("", ""), ""
    if not prepared.python:
        return Versions("", ""), ""
    return Versions(seen.version, seen.packages.get("ray", NO_RAY)), prepared.python


def main(_arguments: Sequence[str]) -> int:
    """Read a question from stdin, and print what does not fit: ``{"what": TEXT, "mend": TEXT}``."""
    question = json.loads(sys.stdin.buffer.read())
    environment: EnvironmentSpec = question["environment"]
    needed = of_cluster()
    if environment["kind"] in {"default", "ray"}:
        problem = None
    elif environment["kind"] in ("uv", "pip"):
        found, where = of_files(environment, question["files"])
        problem = mismatch(found, needed, environment, where)
    else:
        with tempfile.TemporaryDirectory(prefix="raylaunch-fit-") as folder:
            env = {**without_ray(os.environ), **question["env"]}
            found, python = of_interpreter(environment, env, Path(folder), Path(question["envs"]))
        problem = mismatch(found, needed, environment, python)
    sys.stdout.write(json.dumps((problem or Mismatch("", ""))._asdict()) + "\n")
    return 0
