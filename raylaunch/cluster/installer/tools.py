"""uv on the host: which one, and how it is run."""

from __future__ import annotations

import configparser
import contextlib
import errno
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from raylaunch.cluster.installer.folders import Places, storage_problem
from raylaunch.cluster.installer.protocol import InstallerProblem, Request, report_progress

_UV_INDEX = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_NO_INDEX", "UV_FIND_LINKS")
_PIP_INDEX = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def index_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what uv's environment needs so that it asks the index, proxy and certificates that pip would."""
    pip = _pip_settings(environ)
    added: dict[str, str] = {}
    if "cert" in pip and "SSL_CERT_FILE" not in environ:
        added["SSL_CERT_FILE"] = pip["cert"]
    if "proxy" in pip and not any(name in environ for name in _PROXIES):
        added |= {"HTTPS_PROXY": pip["proxy"], "HTTP_PROXY": pip["proxy"]}
    if any(name in environ for name in _UV_INDEX) or _uv_names_an_index(environ):
        return added
    if "index-url" in pip:
        added["UV_DEFAULT_INDEX"] = pip["index-url"]
    if "extra-index-url" in pip:
        added |= {"UV_INDEX": " ".join(pip["extra-index-url"].split()), "UV_INDEX_STRATEGY": "unsafe-best-match"}
    if "find-links" in pip:
        added["UV_FIND_LINKS"] = ",".join(pip["find-links"].split())
    if "trusted-host" in pip:
        added["UV_INSECURE_HOST"] = " ".join(pip["trusted-host"].split())
    if pip.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        added["UV_NO_INDEX"] = "1"
    return added


def pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what pip's environment needs so that it downloads with the credentials that uv has; and as it is asked."""
    added = {"PIP_CONSTRAINT": os.devnull, "PIP_REQUIRE_VIRTUALENV": "0", "PIP_NO_COLOR": "1"}
    index = environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL")
    if index and not any(name in environ for name in _PIP_INDEX) and "index-url" not in _pip_settings(environ):
        added["PIP_INDEX_URL"] = index
    if "SSL_CERT_FILE" in environ and "PIP_CERT" not in environ:
        added["PIP_CERT"] = environ["SSL_CERT_FILE"]
    return added


def _pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return pip's settings by name, as it would read them: system, user, environment's own, variables."""
    found: dict[str, str] = {}
    for path in _pip_files(environ):
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read_string(path.read_text(encoding="utf-8"))
            for section in ("global", "download", "install"):
                found |= dict(parser[section]) if parser.has_section(section) else {}
    for name, value in environ.items():
        if name.startswith("PIP_") and value:
            found[name[4:].lower().replace("_", "-")] = value
    return found


def _pip_files(environ: Mapping[str, str]) -> Iterator[Path]:
    home = Path(environ.get("HOME") or "~").expanduser()
    yield from (Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"))
    yield home / ".pip" / "pip.conf"
    yield home / "Library" / "Application Support" / "pip" / "pip.conf"
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    yield Path(sys.prefix) / "pip.conf"
    if environ.get("PIP_CONFIG_FILE"):
        yield Path(environ["PIP_CONFIG_FILE"])


def _uv_names_an_index(environ: Mapping[str, str]) -> bool:
    home = Path(environ.get("HOME") or "~").expanduser()
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    for path in (Path(environ.get("UV_CONFIG_FILE") or config / "uv" / "uv.toml"), Path("/etc/uv/uv.toml")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if "index" in path.read_text(encoding="utf-8"):
                return True
    return False


MAKE_S = 1800.0
LAST_LINES = 20

_PIP_S = 600.0
_TELL_EVERY_S = 1.0
_POLL_S = 0.05
_CHUNK = 1024 * 1024
_PROGRAM = 0o755
_PRIVATE = 0o700
_NO_SPACE = "No space left on device"
_AGAIN = "run the same command again; completed steps are skipped"


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
        """Run it, report progress every second, and check its exit status.

        Raises:
            InstallerProblem: it failed, cannot be run here, or has not ended in time.
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

    def _failed(self, what: str, status: int, text: str) -> InstallerProblem:
        if _NO_SPACE in text:
            return storage_problem(OSError(errno.ENOSPC, _NO_SPACE), self._places.root)
        last = "\n".join(f"    {line}" for line in text.strip().splitlines()[-LAST_LINES:])
        msg = f"{what} failed (exit status {status}):\n{last}"
        return InstallerProblem(msg, "fix the cause above, and run the same command again")

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
            return subprocess.Popen(  # noqa: S603 -- the uv that was found
                argv, env=self._environment(), cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        except OSError as error:
            msg = f"{argv[0]} cannot be run on this host ({platform.machine()}): {error.strerror}"
            hint = (
                "if programs may not be run from that folder (noexec, a policy), set root: to another one of that host"
            )
            raise InstallerProblem(msg, hint) from None

    def _wait(self, process: subprocess.Popen[bytes], what: str) -> int:
        began = told = time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            if now - began > MAKE_S:
                process.kill()
                process.wait()
                msg = f"{what} has not ended after {MAKE_S:.0f} s"
                raise InstallerProblem(msg, _AGAIN)
            if now - told > _TELL_EVERY_S:
                told = now
                report_progress(f"{what} ({now - began:.0f} s{self._count()})")
            time.sleep(_POLL_S)
        return process.returncode

    def _count(self) -> str:
        count = len(list(self._places.making.glob("lib/python*/site-packages/*.dist-info")))
        of = f" of {len(self._request.wheels)}" if self._request.wheels else ""
        return f", {count}{of} packages installed" if count else ""


def find_uv(request: Request, places: Places, wheel: Path | None) -> Uv:
    """Return a uv that runs here: from the wheel that was pushed, else the host's own, else installed with its pip.

    Raises:
        InstallerProblem: there is none.
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
            msg = f"uv is not on the host, could not be sent from here, and the host's pip cannot install it: {why}"
            raise InstallerProblem(msg, "install uv there, or run this on a machine that reaches a package index")
    return str(program)


def _install_with_pip(target: Path, env: Mapping[str, str]) -> str:
    report_progress("installing uv with the host's pip")
    argv = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    argv += ["--target", str(target), "uv"]
    try:
        done = subprocess.run(  # noqa: S603 -- the pip of this very Python
            argv, env=dict(env), capture_output=True, text=True, timeout=_PIP_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {_PIP_S:.0f} s"
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
