"""Wheels that came with a job, on a node: which set fits it, and the folder that its runner installs from."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from raylaunch.runner.contract import ADDED_WHEELS, BUILD_WHEELS, WheelSpec

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
