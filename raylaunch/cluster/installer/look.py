"""Whether the environment is there; and if not, what is, and what could never work. Changes nothing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys

from raylaunch.cluster.installer.places import Places, existing
from raylaunch.cluster.installer.words import ConflictProblem, Request, StorageProblem, VersionProblem

MARKER = "raylaunch.json"
"""In a complete environment: what it was made of."""

_ASK_S = 60.0


def look(request: Request) -> dict[str, object]:
    """Say whether the environment is there, and if not, which wheels are.

    Raises:
        Problem: it could never be made here.
    """
    places = Places(request)
    _check_python(request)
    if request.named:
        from raylaunch.cluster.installer.named import check_named  # noqa: PLC0415 -- see `program`

        check_named(request)
    ready = is_ready(request, places)
    if not ready:
        _check_disk(places)
    return {
        "python": str(places.python) if ready else "",
        "wheels": str(places.wheels),
        "have": sorted({path.parent.name for path in places.wheels.glob("*/*.whl")}),
        "free_bytes": shutil.disk_usage(existing(places.root)).free,
    }


def is_ready(request: Request, places: Places) -> bool:
    """Say whether the environment is complete and its interpreter runs."""
    try:
        made = json.loads((places.env / MARKER).read_bytes())
        argv = [str(places.python), "-I", "-c", "import raylaunch.version"]
        done = subprocess.run(argv, timeout=_ASK_S, capture_output=True, check=False)  # noqa: S603 -- ours
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(made["versions"] == request.versions)


def _check_python(request: Request) -> None:
    minor = "{}.{}".format(*sys.version_info[:2])
    if sys.maxsize < 2**32 or platform.python_implementation() != "CPython":
        msg = f"{sys.executable} is {platform.python_implementation()} for {platform.architecture()[0]}"
        raise VersionProblem(msg, "Ray needs a CPython for 64 bit; install one from 3.10 on")
    if not request.named and (minor, platform.machine()) != (request.minor, request.arch):
        msg = f"{sys.executable} is Python {minor} on {platform.machine()}, not {request.minor} on {request.arch}"
        raise VersionProblem(msg, "run the same command again: the host has changed since it was probed")


def _check_disk(places: Places) -> None:
    folder = existing(places.root)
    another = "set root: to a folder of your own on another disk of that host"
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        msg = f"{places.root} cannot be used: you may not write to {folder}"
        raise StorageProblem(msg, another)
    if folder == places.root and folder.stat().st_uid != os.getuid():
        msg = f"{folder} belongs to another user (uid {folder.stat().st_uid})"
        raise ConflictProblem(msg, another)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        msg = f"{folder} is on a file system mounted noexec: neither programs nor Ray's libraries can be run from it"
        raise StorageProblem(msg, f"{another} (see: findmnt -o TARGET,OPTIONS)")
