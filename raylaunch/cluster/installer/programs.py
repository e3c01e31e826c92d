"""uv on the host: which one, and how it is run."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from raylaunch.cluster.installer.index_settings import index_settings
from raylaunch.cluster.installer.places import Places, storage_problem
from raylaunch.cluster.installer.words import Problem, Request, goes

MAKE_S = 1800.0
LAST_LINES = 20

_PIP_S = 600.0
_TELL_EVERY_S = 1.0
_POLL_S = 0.05
_CHUNK = 1024 * 1024
_PROGRAM = 0o755
_PRIVATE = 0o700
_NO_SPACE = "No space left on device"
_AGAIN = "run the same command again: what is done is not done again"


class Uv:
    """The program, and all that decides how it is run.

    Args:
        program: its path.
        request: without wheels in it, the host's own index and its configuration are used; else no network at all.
    """

    def __init__(self, program: str, request: Request, places: Places) -> None:
        self._program = program
        self._request = request
        self._places = places

    def run(self, *arguments: str, what: str) -> None:
        """Run it, say each second how far it is, and judge it by its exit status.

        Raises:
            Problem: it failed, cannot be run here, or has not ended in time.
        """
        log = self._places.making.with_name(f"{self._places.making.name}.log")
        try:
            with log.open("wb") as output:
                status = self._wait(self._start([self._program, *arguments], output.fileno()), what)
            text = log.read_text(encoding="utf-8", errors="replace")
        finally:
            with contextlib.suppress(OSError):
                log.unlink()
        if status != 0:
            raise self._failed(what, status, text)

    def _failed(self, what: str, status: int, text: str) -> Problem:
        if _NO_SPACE in text:
            return storage_problem(OSError(errno.ENOSPC, _NO_SPACE), self._places.root)
        last = "\n".join(f"    {line}" for line in text.strip().splitlines()[-LAST_LINES:])
        msg = f"{what} failed (exit status {status}):\n{last}"
        return Problem(msg, "see why above, mend it, and run the same command again")

    def _environment(self) -> dict[str, str]:
        foreign = ("PYTHON", "VIRTUAL_ENV", "CONDA")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        if self._request.wheels:
            env = {name: value for name, value in env.items() if not name.startswith(("UV_", "PIP_"))}
            env["UV_NO_CONFIG"] = "1"
        else:
            env |= index_settings(env)
        cache = str(self._places.cache)
        return env | {"UV_CACHE_DIR": cache, "UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never", "NO_COLOR": "1"}

    def _start(self, argv: Sequence[str], output: int) -> subprocess.Popen[bytes]:
        folder = self._places.versions
        try:
            return subprocess.Popen(  # noqa: S603 -- the uv that was looked for
                argv, env=self._environment(), cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        except OSError as error:
            msg = f"{argv[0]} cannot be run on this host ({platform.machine()}): {error.strerror}"
            hint = (
                "if programs may not be run from that folder (noexec, a policy), set root: to another one of that host"
            )
            raise Problem(msg, hint) from None

    def _wait(self, process: subprocess.Popen[bytes], what: str) -> int:
        began = told = time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            if now - began > MAKE_S:
                process.kill()
                process.wait()
                msg = f"{what} has not ended after {MAKE_S:.0f} s"
                raise Problem(msg, _AGAIN)
            if now - told > _TELL_EVERY_S:
                told = now
                goes(f"{what} ({now - began:.0f} s{self._count()})")
            time.sleep(_POLL_S)
        return process.returncode

    def _count(self) -> str:
        count = len(list(self._places.making.glob("lib/python*/site-packages/*.dist-info")))
        of = f" of {len(self._request.wheels)}" if self._request.wheels else ""
        return f", {count}{of} packages are in" if count else ""


def find_uv(request: Request, places: Places, wheel: Path | None) -> Uv:
    """Return a uv that runs here: from the wheel that was pushed, else the host's own, else installed with its pip.

    Raises:
        Problem: there is none.
    """
    program = _from_wheel(wheel, places) if wheel else _of_host(places)
    return Uv(program, request, places)


def _from_wheel(wheel: Path, places: Places) -> str:
    program = places.root / "uv" / wheel.parent.name[:16] / "uv"
    if not program.exists():
        program.parent.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        beside = program.with_name(f".uv.{os.getpid()}")
        with zipfile.ZipFile(wheel) as archive, beside.open("wb") as target:
            member = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
            with archive.open(member) as source:
                shutil.copyfileobj(source, target, _CHUNK)
        beside.chmod(_PROGRAM)
        beside.replace(program)
    return str(program)


def _of_host(places: Places) -> str:
    folders = [os.environ.get("PATH", os.defpath), *map(os.path.expanduser, ("~/.local/bin", "~/.cargo/bin"))]
    if found := shutil.which("uv", path=os.pathsep.join(folders)):
        return found
    target = places.root / "uv" / "pip"
    program = target / "bin" / "uv"
    if not program.exists():
        why = _install_with_pip(target, os.environ)
        if not program.exists():
            msg = f"uv is not on the host, not to be had from here, and the host's pip cannot install it: {why}"
            raise Problem(msg, "install uv there, or run this where a package index can be reached")
    return str(program)


def _install_with_pip(target: Path, env: Mapping[str, str]) -> str:
    goes("installs uv with the host's pip")
    argv = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    argv += ["--target", str(target), "uv"]
    try:
        done = subprocess.run(  # noqa: S603 -- the pip of this very Python
            argv, env=dict(env), capture_output=True, text=True, timeout=_PIP_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {_PIP_S:.0f} s"
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
