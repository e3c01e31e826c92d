"""Wheels that came with a job, on a node: which set fits it, and the folder that its runner installs from."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from raylaunch.runner.contract import ADDED_WHEELS, BUILD_WHEELS, WheelSpec

_ASK_S = 10.0
_VERSION = re.compile(r"\d+\.\d+\.\d+[a-z0-9+]{0,8}")
WHOLE = "wheel"
"""Name of a wheel inside its package's folder: what a file is called is each job's to say."""


class Platform(TypedDict):
    """`raylaunch.wheel_sets.BuildPlatform`, as plain data."""

    arch: str
    glibc: str
    python: str


class WheelSet(TypedDict):
    """`raylaunch.wheel_sets.WheelSet`, as plain data."""

    platform: Platform
    wheels: list[WheelSpec]


def this_platform() -> Platform:
    """Return what decides which wheels fit here."""
    library, version = platform.libc_ver()
    return Platform(
        arch=platform.machine(), glibc=version if library == "glibc" else "", python=platform.python_version()
    )


def platform_of(environment: Mapping[str, str], env: Mapping[str, str]) -> Platform:
    """Return what decides which wheels fit an environment that is on this node: its own Python counts.

    Of one in the working directory, which is not here yet, and of one that does not run, nothing is known: then it is
    the Python of this process, as for those that are made. Blocks for `_ASK_S` at most.

    Args:
        environment: its kind and value.
        env: variables of the job.
    """
    here = this_platform()
    python = _python_of(environment["kind"], environment["value"], env)
    if python is None:
        return here
    try:
        asked = subprocess.run(  # noqa: S603 -- the interpreter that the job would run
            [python, "-I", "-c", "import platform; print(platform.python_version())"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_ASK_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return here
    version = asked.stdout.strip()
    return Platform(arch=here["arch"], glibc=here["glibc"], python=version) if _VERSION.fullmatch(version) else here


def _python_of(kind: str, value: str, env: Mapping[str, str]) -> str | None:
    """Return the interpreter of a named environment; None where it is not known, or there is none."""
    path = Path(value).expanduser() if value.startswith(("/", "~/")) else None
    if kind == "python":
        return shutil.which(value if path is None else str(path), path=env.get("PATH") or os.defpath)
    if kind == "conda" and path is None:
        conda = env.get("CONDA_EXE") or shutil.which("conda", path=env.get("PATH") or os.defpath)
        roots = [Path(conda).resolve().parent.parent] if conda else []
        places = [*(root / "envs" / value for root in roots), Path("~/.conda/envs").expanduser() / value]
        path = next((place for place in places if place.is_dir()), None)
    found = path / "bin" / "python" if path is not None and kind in {"venv", "conda"} else None
    return str(found) if found is not None and found.exists() else None


def chosen(sets: Iterable[WheelSet], here: Platform) -> list[WheelSpec]:
    """Return the wheels for this platform; none where nobody gathered any for it: it reaches an index, or did."""
    return next((one["wheels"] for one in sets if one["platform"] == here), [])


def lay_out(packages: Path, wheels: Iterable[WheelSpec], folder: Path) -> None:
    """Make a folder in which each wheel has its name, and one each for those to build with and those that are added.

    May be repeated; without wheels there is none.
    """
    listed = list(wheels)
    own = [one for one in listed if not one["build"] and not one["added"]]
    _lay_out(packages, own, folder)
    _lay_out(packages, [one for one in listed if one["build"]], folder.with_name(BUILD_WHEELS))
    _lay_out(packages, [one for one in listed if one["added"]], folder.with_name(ADDED_WHEELS))


def _lay_out(packages: Path, wheels: Iterable[WheelSpec], folder: Path) -> None:
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    for wheel in wheels:
        beside.mkdir(mode=0o700, exist_ok=True)
        (beside / os.path.basename(wheel["file"])).symlink_to(packages / wheel["sha256"] / WHOLE)  # noqa: PTH119 -- a name from elsewhere
    if beside.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
