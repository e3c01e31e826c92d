"""Environments that are made on the node, once per content: ``uv`` from a lock file, ``pip`` from requirements."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from raylaunch.runner.watch import Pulse, Ran, run_program

if TYPE_CHECKING:
    from raylaunch.runner.contract import EnvironmentSpec

_BUILD_S = 3600.0
_NESTED_LIMIT = 5
_COMPLETE = ".raylaunch-complete"
_NO_INDEX = re.compile(
    r"Failed to establish a new connection|Temporary failure in name resolution|Network is unreachable|"
    r"Connect(?:ion)?(?: to \S+)? timed out|ConnectTimeout|dns error|error sending request|client error \(Connect\)",
    re.IGNORECASE,
)
_NO_INDEX_WORDS = (
    "this node reaches no package index. Submit the job again with raylaunch, from a machine that reaches one: the "
    "wheels go along then. Or name an environment that is there already (environment: venv:PATH). It said: "
)
_NESTED = re.compile(r"^\s*(?:-r|--requirement|-c|--constraint)[ =]\s*(\S+)", re.MULTILINE)


class Place(NamedTuple):
    """Folders: the attempt's working directory and scratch, the node's environments; and the log of what is made."""

    code: Path
    tmp: Path
    envs: Path
    setup_log: Path
    wheels: Path
    """Wheels that came with the job; there is no such folder where the node reaches a package index."""


class EnvironmentProblem(Exception):  # noqa: N818 -- the word that the exit facts use
    """The environment cannot be used; the text says what is missing and what to do."""


def uv_environment(env: dict[str, str], place: Place, pulse: Pulse) -> Path:
    """Return the folder of the environment that the project's own lock describes, synced if it is not there yet.

    The project itself is not installed into it: other attempts share it, with other copies of the code.

    Raises:
        EnvironmentProblem: no lock file, no uv, or the sync failed.
    """
    for name in ("pyproject.toml", "uv.lock"):
        if not (place.code / name).is_file():
            hint = "; make it with: uv lock" if name == "uv.lock" else ""
            msg = f"the environment uv needs {name} in the working directory{hint}"
            raise EnvironmentProblem(msg)
    if place.wheels.is_dir():
        return _from_wheels(env, place, pulse)
    uv = _find_uv(env)
    if uv is None:
        msg = "the environment uv needs the program uv, which is not on this node's PATH; install it, or use pip"
        raise EnvironmentProblem(msg)
    names = ("pyproject.toml", "uv.lock", ".python-version")
    content = b"\0".join((place.code / name).read_bytes() if (place.code / name).is_file() else b"" for name in names)
    prefix = place.envs / f"uv-{hashlib.sha256(content).hexdigest()[:16]}"
    build_env = {**env, "UV_PROJECT_ENVIRONMENT": str(prefix)}
    build_env.pop("VIRTUAL_ENV", None)
    with _building(prefix, pulse) as needed:
        if needed:
            command = [uv, "sync", "--frozen", "--no-install-project", "--no-progress"]
            _build(command, build_env, place, pulse, what="uv sync --frozen")
    return prefix


def pip_environment(spec: EnvironmentSpec, env: dict[str, str], place: Place, pulse: Pulse) -> Path:
    """Return the folder of a virtual environment with these requirements, made if it is not there yet.

    Raises:
        EnvironmentProblem: no such file, or the installation failed.
    """
    if place.wheels.is_dir():
        return _from_wheels(env, place, pulse)
    if spec["value"]:
        file = place.code / spec["value"]
        if not file.is_file():
            msg = f"the requirements file {spec['value']} is not in the working directory"
            raise EnvironmentProblem(msg)
        content, arguments = _requirements_text(file, depth=0), ["-r", str(file)]
    else:
        content, arguments = "\n".join(spec["requirements"]), list(spec["requirements"])
    prefix = _prefix("pip", content, place)
    build_env = _without_other_pythons(env)
    with _building(prefix, pulse) as needed:
        if needed:
            _make_venv(prefix, build_env, place, pulse)
            python = str(prefix / "bin" / "python")
            install = _installer(python, build_env) + arguments
            _build(install, build_env, place, pulse, what="the installation of the requirements")
    return prefix


def _from_wheels(env: dict[str, str], place: Place, pulse: Pulse) -> Path:
    """Return the folder of an environment of exactly the wheels that came with the job; nothing is asked anywhere.

    Raises:
        EnvironmentProblem: the installation failed.
    """
    wheels = sorted(place.wheels.iterdir())
    prefix = _prefix("wheels", "\n".join(f"{wheel.name} {wheel.readlink()}" for wheel in wheels), place)
    build_env = _without_other_pythons(env)
    with _building(prefix, pulse) as needed:
        if needed:
            _make_venv(prefix, build_env, place, pulse)
            install = [*_installer(str(prefix / "bin" / "python"), build_env), "--no-index", "--no-deps"]
            command = [*install, *(str(wheel) for wheel in wheels)]
            _build(command, build_env, place, pulse, what="the installation of the wheels that came with the job")
    return prefix


def _prefix(kind: str, content: str, place: Place) -> Path:
    key = f"{sys.version}\0{sys.executable}\0{content}"
    return place.envs / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _without_other_pythons(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _requirements_text(file: Path, *, depth: int) -> str:
    """Return a requirements file and those that it includes: what decides whether an environment can be used again."""
    text = file.read_text(encoding="utf-8", errors="replace")
    for name in _NESTED.findall(text) if depth < _NESTED_LIMIT else []:
        nested = file.parent / name
        if nested.is_file():
            text += f"\0{name}\0" + _requirements_text(nested, depth=depth + 1)
    return text


def _find_uv(env: dict[str, str]) -> str | None:
    places = [env.get("PATH") or os.defpath, str(Path(sys.executable).parent)]
    places += [str(Path(place).expanduser()) for place in ("~/.local/bin", "~/.cargo/bin")]
    return shutil.which("uv", path=os.pathsep.join(places))


def _make_venv(prefix: Path, env: dict[str, str], place: Place, pulse: Pulse) -> None:
    """Make an empty environment; where ensurepip is missing (Debian without python3-venv), uv can."""
    uv = _find_uv(env)
    try:
        _build([sys.executable, "-I", "-m", "venv", str(prefix)], env, place, pulse, what="python -m venv")
    except EnvironmentProblem:
        shutil.rmtree(str(prefix), ignore_errors=True)
        if uv is None:
            raise
        _build([uv, "venv", "--python", sys.executable, str(prefix)], env, place, pulse, what="uv venv")


def _installer(python: str, env: dict[str, str]) -> list[str]:
    pip = Path(python).parent / "pip"
    if pip.exists():
        return [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    return [_find_uv(env) or "uv", "pip", "install", "--python", python]


def _build(command: Sequence[str], env: dict[str, str], place: Place, pulse: Pulse, *, what: str) -> None:
    try:
        with place.setup_log.open("a+b") as output:
            ran = run_program(command, env=env, cwd=place.code, timeout_s=_BUILD_S, pulse=pulse, output=output)
    except OSError as error:
        msg = f"{what} could not be started: {error}"
        raise EnvironmentProblem(msg) from None
    if ran.status != 0:
        why = _NO_INDEX_WORDS if _NO_INDEX.search(ran.output) else ""
        msg = f"{what} failed: {why}{last_words(ran)} (all of it is in logs/setup.log)"
        raise EnvironmentProblem(msg)


def last_words(ran: Ran) -> str:
    """Return the line of a failed program's output that says most."""
    if ran.status is None:
        return "it did not end in time"
    lines = [line.strip() for line in ran.output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|not find|no such|\u00d7", line, re.IGNORECASE)]
    return (telling or lines or [f"exit status {ran.status}"])[-1][:400]


@contextlib.contextmanager
def _building(prefix: Path, pulse: Pulse) -> Iterator[bool]:
    """Hold the lock of one environment; yields whether it has to be made. It counts when the block ends well."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    if (prefix / _COMPLETE).exists():
        yield False
        return
    with prefix.with_name(f"{prefix.name}.lock").open("ab") as lock:
        while not _locked(lock.fileno()):
            pulse.check()
            time.sleep(0.2)
        if (prefix / _COMPLETE).exists():
            yield False
            return
        shutil.rmtree(str(prefix), ignore_errors=True)  # begun by a runner that was killed
        yield True
        (prefix / _COMPLETE).touch()


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
