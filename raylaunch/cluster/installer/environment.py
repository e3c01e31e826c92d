"""The environment on the host: checking it, making it in a temporary folder under a lock, or adding to a named one."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from raylaunch.cluster.installer.folders import Places, existing, storage_problem, sync, unpack
from raylaunch.cluster.installer.protocol import InstallerProblem, Request, report, report_progress
from raylaunch.cluster.installer.tools import LAST_LINES, MAKE_S, Uv, find_uv

MARKER = "raylaunch.json"
"""In a complete environment: what it was made of."""

_ASK_S = 60.0
_REPORT_EVERY_S = 1.0
_POLL_S = 0.05
_IMPORT_S = 300.0
_CHUNK = 1024 * 1024
_PROGRAM = 0o755
_CONSOLE = '#!/bin/sh\nexec "$(dirname -- "$0")/python" -m raylaunch "$@"\n'
_CHECK = """
import importlib, json, sys
from importlib.metadata import version
modules, names = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
print(json.dumps({name: version(name) for name in names}))
"""


def main(body: str) -> int:
    """Do what the request asks for; return the exit status."""
    os.umask(0o077)
    request = Request.read(body)
    verbs = {"look": look, "make": make, "add_beside": add_beside}
    try:
        result = verbs[request.verb](request)
    except (InstallerProblem, OSError) as error:
        problem = (
            storage_problem(error, Path(str(error.filename or request.root))) if isinstance(error, OSError) else error
        )
        report("error", {"code": problem.code, "message": problem.message, "hint": problem.hint})
        return 1
    report("result", result)
    return 0


def look(request: Request) -> dict[str, object]:
    """Return whether the environment exists, and which wheels do.

    Raises:
        InstallerProblem: it could never be made here.
    """
    places = Places(request)
    _check_python(request)
    if request.named:
        _check_named(request)
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
    """Return whether the environment is complete and its interpreter runs."""
    try:
        made = json.loads((places.env / MARKER).read_bytes())
        argv = [str(places.python), "-I", "-c", "import raylaunch.version"]
        done = subprocess.run(argv, timeout=_ASK_S, capture_output=True, check=False)  # noqa: S603 -- ours
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(made["versions"] == request.versions)


def _check_named(request: Request) -> None:
    """Check the environment that runs this.

    Raises:
        InstallerProblem: it lacks something; the hint is the command that installs it.
    """
    wrong = [words for words in map(_mismatch, request.requirements) if words]
    if wrong:
        command = " ".join([sys.executable, "-m", "pip", "install", *(f"'{one}'" for one in request.requirements)])
        msg = f"the environment of {sys.executable} does not fit: {'; '.join(wrong)}"
        raise InstallerProblem(msg, f"on that host: {command}", code="version")


def _mismatch(requirement: str) -> str:
    try:
        packaging = importlib.import_module("packaging.requirements")  # Ray needs it: where Ray is, it is
    except ImportError:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        return "" if _installed(name) else f"it has no {name}"
    parsed = packaging.Requirement(requirement)
    if parsed.marker is not None and not parsed.marker.evaluate():
        return ""
    version = _installed(parsed.name)
    if not version:
        return f"it has no {parsed.name}"
    fits = parsed.specifier.contains(version, prereleases=True)
    return "" if fits else f"it has {parsed.name} {version}, not {parsed.specifier}"


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _check_python(request: Request) -> None:
    minor = "{}.{}".format(*sys.version_info[:2])
    if sys.maxsize < 2**32 or platform.python_implementation() != "CPython":
        msg = f"{sys.executable} is {platform.python_implementation()} for {platform.architecture()[0]}"
        raise InstallerProblem(msg, "Ray needs a CPython for 64 bit; install one from 3.10 on", code="version")
    if not request.named and (minor, platform.machine()) != (request.minor, request.arch):
        msg = f"{sys.executable} is Python {minor} on {platform.machine()}, not {request.minor} on {request.arch}"
        raise InstallerProblem(
            msg, "run the same command again: the host has changed since it was probed", code="version"
        )


def _check_disk(places: Places) -> None:
    folder = existing(places.root)
    another = "set root: to a folder of your own on another disk of that host"
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        msg = f"{places.root} cannot be used: you may not write to {folder}"
        raise InstallerProblem(msg, another, code="host_storage")
    if folder == places.root and folder.stat().st_uid != os.getuid():
        msg = f"{folder} belongs to another user (uid {folder.stat().st_uid})"
        raise InstallerProblem(msg, another, code="conflict")
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        msg = f"{folder} is on a file system mounted noexec: neither programs nor Ray's libraries can be run from it"
        raise InstallerProblem(msg, f"{another} (see: findmnt -o TARGET,OPTIONS)", code="host_storage")


def make(request: Request) -> dict[str, object]:
    """Make the environment, unless it exists by now.

    Raises:
        InstallerProblem: it cannot be made.
    """
    with making(request) as (places, needed):
        if needed:
            _make(request, places)
            complete(request, places)
    return {"python": str(places.python)}


def _make(request: Request, places: Places) -> None:
    uv = find_uv(request, places, places.wheel(request.uv) if request.uv else None)
    make_venv = ["venv", "--quiet", "--relocatable", "--python", sys.executable, str(places.making)]
    uv.run(*make_venv, what="creating a virtual environment")
    install = ["pip", "install", "--python", str(places.making / "bin" / "python"), "--no-deps", "--no-build"]
    uv.run(*install, *_sources(request, places, uv), what="installing Ray, wandb and their dependencies")
    if request.own:
        own = str(places.wheel(request.own))
        uv.run(*install, "--offline", "--no-index", own, what="installing raylaunch")


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
    uv.run("pip", "compile", *options, "--output-file", str(pins), str(wanted), what="querying the package index")
    return ["--requirement", str(pins)]


@contextlib.contextmanager
def making(request: Request) -> Iterator[tuple[Places, bool]]:
    """Hold the lock of one environment; yield its folders, and whether it has to be made. Remove leftovers.

    Raises:
        InstallerProblem: another process held the lock too long.
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
        if request.bundle:
            unpack(places, Path(request.bundle))
        _check_wheels(request, places)
        try:
            yield places, True
        finally:
            _sweep(places)


def _sweep(places: Places) -> bool:
    """Remove what interrupted processes left; return whether there was anything."""
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
        msg = f"these wheels were damaged and have been removed: {', '.join(path.name for path in damaged)}"
        raise InstallerProblem(msg, "run the same command again, which pushes them again", code="transfer")


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
        InstallerProblem: another process held it too long.
    """
    began = reported = time.monotonic()
    while not _try_lock(descriptor):
        holder, now = _read(descriptor)[0], time.monotonic()
        if now - began > MAKE_S:
            msg = f"another process (pid {holder}) has been making {places.env} for more than {MAKE_S:.0f} s"
            raise InstallerProblem(msg, f"check it on that host: ps -fp {holder}", code="conflict")
        if now - reported > _REPORT_EVERY_S:
            reported = now
            report_progress(
                f"waiting for another process that makes the same environment (pid {holder}, {now - began:.0f} s)"
            )
        time.sleep(_POLL_S)
    booted_then = _read(descriptor)[1]
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {_boot_id()}".encode(), 0)
    return booted_then


def _try_lock(descriptor: int) -> bool:
    """Lock an open file unless another process has it; the kernel frees the lock of one that dies."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(descriptor: int) -> tuple[str, str]:
    """Return who holds the lock, or held it last: the pid, and the boot."""
    pid, _, boot = os.pread(descriptor, 128, 0).decode(errors="replace").partition(" ")
    return pid or "?", boot


def complete(request: Request, places: Places) -> None:
    """Check what was made, write it to the disk, and give it its name.

    Raises:
        InstallerProblem: something cannot be imported, or has another version.
    """
    _check_made(request, places.making)
    made = {"versions": request.versions, "python": sys.executable, "wheels": [one.file for one in request.files()]}
    (places.making / MARKER).write_text(json.dumps(made, indent=1), encoding="utf-8")
    report_progress("writing everything to the disk")
    sync(places.making)
    if places.env.exists():  # it was complete once and does not run any more: its interpreter is gone
        places.env.replace(places.making.with_name(f"{places.making.name}-gone"))
    places.making.replace(places.env)


def _check_made(request: Request, folder: Path) -> None:
    report_progress("checking that everything can be imported")
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
    msg = f"the environment was made but does not work: {why}"
    raise InstallerProblem(msg, "fix the cause above")


def add_beside(request: Request) -> dict[str, object]:
    """Make an environment that holds raylaunch alone and sees all of the one that runs this.

    Raises:
        InstallerProblem: the named one does not fit, or it cannot be made.
    """
    _check_named(request)
    with making(request) as (places, needed):
        if needed and request.own:
            _make_sidecar(places.making, places.wheel(request.own))
            complete(request, places)
    return {"python": str(places.python)}


def _make_sidecar(folder: Path, own: Path) -> None:
    packages = folder / "lib" / "python{}.{}".format(*sys.version_info[:2]) / "site-packages"
    packages.mkdir(parents=True)
    base = Path(str(getattr(sys, "_base_executable", "") or sys.executable))
    lines = [f"home = {base.parent}", f"include-system-site-packages = {str(_sees_base()).lower()}"]
    (folder / "pyvenv.cfg").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    added = "".join(f"import site; site.addsitedir({path!r})\n" for path in _own_packages())
    (packages / "named_environment.pth").write_text(added, encoding="utf-8")
    with zipfile.ZipFile(own) as archive:
        archive.extractall(packages)
    _make_programs(folder / "bin", base)


def _is_virtual() -> bool:
    return sys.prefix != sys.base_prefix


def _own_packages() -> list[str]:
    """Return where a named virtual environment keeps its packages; those of a base Python are seen anyway."""
    return [path for path in site.getsitepackages() if path.startswith(sys.prefix)] if _is_virtual() else []


def _sees_base() -> bool:
    """Say whether the packages of the base Python are to be seen."""
    config = Path(sys.prefix, "pyvenv.cfg")
    if not _is_virtual() or not config.is_file():
        return True
    words = config.read_text(encoding="utf-8").lower().replace(" ", "")
    return "include-system-site-packages=true" in words


def _make_programs(folder: Path, base: Path) -> None:
    """Put the named environment's programs (``torchrun`` and such) where jobs find them, and ours beside."""
    folder.mkdir()
    (folder / "python").symlink_to(base)
    (folder / "python3").symlink_to("python")
    (folder / "raylaunch").write_text(_CONSOLE, encoding="ascii")
    (folder / "raylaunch").chmod(_PROGRAM)
    for program in sorted(Path(sys.prefix, "bin").iterdir()) if _is_virtual() else ():
        ours = program.name.startswith("python") or (folder / program.name).exists()
        if not ours and os.access(program, os.X_OK):
            (folder / program.name).symlink_to(program)
