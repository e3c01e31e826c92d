"""Making the environment: one process at a time, beside its place, checked before it gets its name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from raylaunch.cluster.installer.look import MARKER, is_ready
from raylaunch.cluster.installer.places import Places, is_taken, sync
from raylaunch.cluster.installer.programs import LAST_LINES, MAKE_S, Uv, find_uv
from raylaunch.cluster.installer.unpack import unpack
from raylaunch.cluster.installer.words import ConflictProblem, Problem, Request, TransferProblem, goes

_TELL_EVERY_S = 1.0
_POLL_S = 0.05
_IMPORT_S = 300.0
_CHUNK = 1024 * 1024
_CHECK = """
import importlib, json, sys
from importlib.metadata import version
modules, names = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
print(json.dumps({name: version(name) for name in names}))
"""


def make(request: Request) -> dict[str, object]:
    """Make the environment, unless it is there by now.

    Raises:
        Problem: it cannot be made.
    """
    with making(request) as (places, needed):
        if needed:
            _make(request, places)
            complete(request, places)
    return {"python": str(places.python)}


def _make(request: Request, places: Places) -> None:
    uv = find_uv(request, places, places.wheel(request.uv) if request.uv else None)
    make_venv = ["venv", "--quiet", "--relocatable", "--python", sys.executable, str(places.making)]
    uv.run(*make_venv, what="makes a virtual environment")
    install = ["pip", "install", "--python", str(places.making / "bin" / "python"), "--no-deps", "--no-build"]
    uv.run(*install, *_sources(request, places, uv), what="installs Ray, wandb and what they need")
    if request.own:
        own = str(places.wheel(request.own))
        uv.run(*install, "--offline", "--no-index", own, what="installs raylaunch")


def _sources(request: Request, places: Places, uv: Uv) -> list[str]:
    """Return what to install: wheels of the host's folder, or versions of which its package index knows where."""
    pins = places.making / "pins.txt"
    if request.wheels:
        pins.write_text("".join(f"{one.name}=={one.version}\n" for one in request.wheels), encoding="utf-8")
        links = [f"--find-links={places.wheel(one).parent}" for one in request.wheels]
        return ["--offline", "--no-index", *links, "--requirement", str(pins)]
    wanted = places.making / "wanted.txt"
    wanted.write_text("".join(f"{one}\n" for one in request.requirements), encoding="utf-8")
    preferred = (f"{name}=={version}\n" for name, version in request.preferences.items())
    pins.write_text("".join(preferred), encoding="utf-8")  # uv keeps to what its output holds, where that fits
    options = ["--quiet", "--no-build", "--no-header", "--no-annotate", "--python", sys.executable]
    uv.run("pip", "compile", *options, "--output-file", str(pins), str(wanted), what="asks the package index")
    return ["--requirement", str(pins)]


@contextlib.contextmanager
def making(request: Request) -> Iterator[tuple[Places, bool]]:
    """Hold the lock of one environment; yields its places, and whether it has to be made. What was left is swept.

    Raises:
        Problem: another process held the lock too long.
    """
    places = Places(request)
    places.make()
    with places.lock.open("a+b") as lock:
        booted_then = _take(lock.fileno(), places)
        if is_ready(request, places):
            yield places, False
            return
        if _sweep(places) and booted_then != _boot_id():  # what was unpacked may never have reached the disk
            shutil.rmtree(places.cache, ignore_errors=True)
        unpack(request)
        _check_wheels(request, places)
        try:
            yield places, True
        finally:
            _sweep(places)


def _sweep(places: Places) -> bool:
    """Remove what interrupted ones left; say whether there was anything."""
    found = list(places.versions.glob(f".{places.env.name}.making-*"))
    for left in found:
        shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            left.unlink()
    return bool(found)


def _check_wheels(request: Request, places: Places) -> None:
    """Compare the wheels with their checksums: power that fails may leave the name of a file, and not its bytes."""
    damaged = [path for path in map(places.wheel, request.files()) if _sha256(path) != path.parent.name]
    for path in damaged:
        path.unlink()
    if damaged:
        msg = f"these wheels were damaged, and are removed: {', '.join(path.name for path in damaged)}"
        raise TransferProblem(msg, "run the same command again: they are pushed anew")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _take(descriptor: int, places: Places) -> str:
    """Take the lock of the environment; return the boot during which it was held before.

    Raises:
        Problem: another process held it too long.
    """
    began = told = time.monotonic()
    while not is_taken(descriptor):
        holder, now = _read(descriptor)[0], time.monotonic()
        if now - began > MAKE_S:
            msg = f"another process (pid {holder}) has been making {places.env} for more than {MAKE_S:.0f} s"
            raise ConflictProblem(msg, f"look at it on that host: ps -fp {holder}")
        if now - told > _TELL_EVERY_S:
            told = now
            goes(f"waits for another that makes the same (pid {holder}, {now - began:.0f} s)")
        time.sleep(_POLL_S)
    booted_then = _read(descriptor)[1]
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {_boot_id()}".encode(), 0)
    return booted_then


def _read(descriptor: int) -> tuple[str, str]:
    """Return who holds the lock, or held it last: the pid, and the boot."""
    pid, _, boot = os.pread(descriptor, 128, 0).decode(errors="replace").partition(" ")
    return pid or "?", boot


def complete(request: Request, places: Places) -> None:
    """Check what was made, write it to the disk, and give it its name.

    Raises:
        Problem: something cannot be imported, or has another version.
    """
    _check_made(request, places.making)
    made = {"versions": request.versions, "python": sys.executable, "wheels": [one.file for one in request.files()]}
    (places.making / MARKER).write_text(json.dumps(made, indent=1), encoding="utf-8")
    goes("writes everything to the disk")
    sync(places.making)
    if places.env.exists():  # it was complete once and does not run any more: its interpreter is gone
        places.env.replace(places.making.with_name(f"{places.making.name}-gone"))
    places.making.replace(places.env)


def _check_made(request: Request, folder: Path) -> None:
    goes("checks that everything can be imported")
    facts = json.dumps([request.imports, sorted(request.versions)])
    argv = [str(folder / "bin" / "python"), "-I", "-c", _CHECK, facts]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_IMPORT_S, check=False)  # noqa: S603 -- ours
    except subprocess.TimeoutExpired:
        why = f"importing {', '.join(request.imports)} has not ended after {_IMPORT_S:.0f} s"
    else:
        lines = done.stdout.strip().splitlines()
        found = json.loads(lines[-1]) if done.returncode == 0 and lines else None
        if found == request.versions:
            return
        said = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-LAST_LINES:])
        why = f"\n{said}" if found is None else f"it holds {found} and should hold {request.versions}"
    msg = f"the environment was made and does not work: {why}"
    raise Problem(msg, "see why above")
