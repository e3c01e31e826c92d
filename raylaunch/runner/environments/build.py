"""Environments that are made on the node, once per content: ``uv`` from a lock file, ``pip`` from requirements."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from raylaunch import contract
from raylaunch.runner.control import HelperResult, run_program
from raylaunch.runner.environments.local_sources import Requirements, local_exports, local_packages, read_requirements

if TYPE_CHECKING:
    from raylaunch.contract import EnvironmentSpec
    from raylaunch.runner.control import Heartbeat

PIP_OPTIONS = ("install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off")
_BUILD_S = 3600.0
_COMPLETE = ".raylaunch-complete"
_NO_INDEX = re.compile(
    r"Failed to establish a new connection|Temporary failure in name resolution|Network is unreachable|"
    r"Connect(?:ion)?(?: to \S+)? timed out|ConnectTimeout|dns error|error sending request|client error \(Connect\)",
    re.IGNORECASE,
)
_NO_INDEX_ADVICE = (
    "this node cannot reach a package index. Submit the job again with raylaunch from a machine that can: it sends the "
    "wheels too. Or name an existing environment (environment: venv:PATH). Output: "
)


class BuildContext(NamedTuple):
    """What making and inspecting an environment needs.

    Args:
        code: the attempt's working directory.
        tmp: its scratch folder.
        envs: the node's environments.
        setup_log: the log of what is made.
        wheels: wheels that came with the job; there is no such folder where the node reaches a package index.
        heartbeat: continues meanwhile, and ends it when the attempt is to stop.
    """

    code: Path
    tmp: Path
    envs: Path
    setup_log: Path
    wheels: Path
    heartbeat: Heartbeat

    @property
    def build_wheels(self) -> Path:
        """Wheels that came along to build the projects of the working directory with."""
        return self.wheels.with_name(contract.BUILD_WHEELS)

    @property
    def added_wheels(self) -> Path:
        """Wheels that came along for the packages that a job adds to the cluster's own environment."""
        return self.wheels.with_name(contract.ADDED_WHEELS)

    @property
    def offline(self) -> bool:
        """Whether wheels came along, because the node reaches no package index."""
        return any(folder.is_dir() for folder in (self.wheels, self.build_wheels, self.added_wheels))

    def run(self, command: Sequence[str], env: dict[str, str], *, what: str, timeout_s: float = _BUILD_S) -> None:
        """Run a program that makes or activates an environment; its output goes to the attempt's log of its setup.

        Raises:
            EnvironmentProblem: it failed; the text has its most useful line.
        """
        try:
            with self.setup_log.open("a+b") as log:
                ran = run_program(
                    command, env=env, cwd=self.code, timeout_s=timeout_s, heartbeat=self.heartbeat, output=log
                )
        except OSError as error:
            msg = f"{what} could not be started: {error}"
            raise EnvironmentProblem(msg) from None
        if ran.status != 0:
            why = _NO_INDEX_ADVICE if _NO_INDEX.search(ran.output) else ""
            msg = f"{what} failed: {why}{failure_line(ran)} (full output: logs/setup.log)"
            raise EnvironmentProblem(msg)

    @contextlib.contextmanager
    def building(self, prefix: Path) -> Iterator[bool]:
        """Hold the lock of one environment; yields whether it has to be made. It counts when the block ends well."""
        prefix.parent.mkdir(parents=True, exist_ok=True)
        if (prefix / _COMPLETE).exists():
            yield False
            return
        with prefix.with_name(f"{prefix.name}.lock").open("ab") as lock:
            while not _locked(lock.fileno()):
                self.heartbeat.check()
                time.sleep(0.2)
            if (prefix / _COMPLETE).exists():
                yield False
                return
            shutil.rmtree(str(prefix), ignore_errors=True)  # left by a runner that was killed
            yield True
            (prefix / _COMPLETE).touch()


class PreparedEnvironment(NamedTuple):
    """An environment that is there.

    Args:
        env: the variables of its processes.
        python: its interpreter; empty when it has none.
        sites: folders with packages that lie elsewhere than below the interpreter's.
    """

    env: dict[str, str]
    python: str
    sites: tuple[str, ...] = ()


class EnvironmentProblem(Exception):  # noqa: N818 -- the word that the exit facts use
    """The environment cannot be used; the text has what is missing and what to do."""


def uv_environment(env: dict[str, str], context: BuildContext) -> Path:
    """Return the folder of what the project's own lock pins, synced if it is not there yet.

    The project itself, and others in its working directory, are not in it: attempts with other code share it.

    Raises:
        EnvironmentProblem: no lock file, no uv, or the sync failed.
    """
    for name in ("pyproject.toml", "uv.lock"):
        if not (context.code / name).is_file():
            hint = "; create it with: uv lock" if name == "uv.lock" else ""
            msg = f"the environment uv needs {name} in the working directory{hint}"
            raise EnvironmentProblem(msg)
    if context.offline:
        return _wheel_environment(env, context)
    uv = find_uv(env)
    if uv is None:
        msg = "the environment uv needs the program uv, which is not on this node's PATH; install it, or use pip"
        raise EnvironmentProblem(msg)
    names = ("pyproject.toml", "uv.lock", ".python-version")
    lock = (context.code / "uv.lock").read_text(encoding="utf-8", errors="replace")
    content = b"\0".join(
        (context.code / name).read_bytes() if (context.code / name).is_file() else b"" for name in names
    )
    prefix = context.envs / f"uv-{hashlib.sha256(content).hexdigest()[:16]}"
    build_env = {**env, "UV_PROJECT_ENVIRONMENT": str(prefix)}
    build_env.pop("VIRTUAL_ENV", None)
    with context.building(prefix) as needed:
        if needed:
            command = [uv, "sync", "--frozen", "--no-install-project", "--no-progress"]
            command += [f"--no-install-package={name}" for name in local_packages(lock)[0]]
            context.run(command, build_env, what="uv sync --frozen")
    return prefix


def projects_of_lock(env: dict[str, str], context: BuildContext) -> tuple[str, ...]:
    """Return what of a lock is in the working directory and wanted by the project, as lines of a requirements file.

    Raises:
        EnvironmentProblem: the node has no uv, or it cannot read the lock.
    """
    uv = find_uv(env)
    if uv is None:
        msg = "the project has a build system, so installing it needs uv, which is not on this node"
        raise EnvironmentProblem(msg)
    listed = context.tmp / "locked.txt"
    command = [uv, "export", "--frozen", "--no-hashes", "--no-header", "--no-annotate", "--quiet", "-o", str(listed)]
    context.run(command, without_other_pythons(env), what="uv export")
    return local_exports(listed.read_text(encoding="utf-8"), context.code)


def requirements_of(spec: EnvironmentSpec, context: BuildContext) -> Requirements:
    """Return what an environment of the kind ``pip`` is made of.

    Raises:
        EnvironmentProblem: there is no such file.
    """
    if not spec["value"]:
        return read_requirements("\n".join(spec["requirements"]), parent=context.code, code=context.code)
    file = context.code / spec["value"]
    if not file.is_file():
        msg = f"the requirements file {spec['value']} is not in the working directory"
        raise EnvironmentProblem(msg)
    text = file.read_text(encoding="utf-8", errors="replace")
    return read_requirements(text, parent=file.parent, code=context.code)


def pip_environment(required: Requirements, env: dict[str, str], context: BuildContext) -> Path:
    """Return the folder of a virtual environment with these requirements, made if it is not there yet.

    Projects of the working directory are not in it, only what they need: attempts with other code share it.

    Raises:
        EnvironmentProblem: the installation failed.
    """
    if context.offline:
        return _wheel_environment(env, context)
    prefix = prefix_of("pip", required.key, context)
    build_env = without_other_pythons(env)
    with context.building(prefix) as needed:
        if needed:
            make_venv(sys.executable, prefix, build_env, context)
            listed = context.tmp / "requirements.txt"
            listed.write_text("".join(f"{line}\n" for line in required.lines), encoding="utf-8")
            install = [*_installer(str(prefix / "bin" / "python"), build_env), "-r", str(listed)]
            context.run(install, build_env, what="the installation of the requirements")
            _remove_projects(prefix, build_env, context)
    return prefix


def _remove_projects(prefix: Path, env: dict[str, str], context: BuildContext) -> None:
    """Remove projects installed from a folder: only their dependencies are shared; their code is each attempt's own."""
    origins = prefix.glob("lib/python3*/site-packages/*.dist-info/direct_url.json")
    names = [one.parent.name.split("-")[0] for one in origins if "dir_info" in json.loads(one.read_text("utf-8"))]
    if names:
        python = str(prefix / "bin" / "python")
        pip = (prefix / "bin" / "pip").exists()
        program = (
            [python, "-m", "pip", "uninstall", "-y"]
            if pip
            else [str(find_uv(env)), "pip", "uninstall", "--python", python]
        )
        context.run([*program, *names], env, what="the removal of projects from a shared environment")


def _wheel_environment(env: dict[str, str], context: BuildContext) -> Path:
    """Return the folder of an environment of exactly the wheels that came with the job; no index is used.

    Raises:
        EnvironmentProblem: the installation failed.
    """
    wheels = wheels_in(context.wheels)
    prefix = prefix_of("wheels", "\n".join(f"{wheel.name} {wheel.readlink()}" for wheel in wheels), context)
    build_env = without_other_pythons(env)
    with context.building(prefix) as needed:
        if needed:
            make_venv(sys.executable, prefix, build_env, context)
            if not wheels:
                return prefix
            install = [*_installer(str(prefix / "bin" / "python"), build_env), "--no-index", "--no-deps"]
            command = [*install, *(str(wheel) for wheel in wheels)]
            context.run(command, build_env, what="the installation of the wheels that came with the job")
    return prefix


def prefix_of(kind: str, content: str, context: BuildContext) -> Path:
    """Return the folder of the environment with this content."""
    key = f"{sys.version}\0{sys.executable}\0{content}"
    return context.envs / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def without_other_pythons(env: dict[str, str]) -> dict[str, str]:
    """Return `env` without variables that lead an interpreter to the packages of another."""
    return {name: value for name, value in env.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def find_uv(env: dict[str, str]) -> str | None:
    """Return the program uv of this node: on the PATH, with Ray's Python, or in a usual place."""
    places = [env.get("PATH") or os.defpath, str(Path(sys.executable).parent)]
    places += [str(Path(place).expanduser()) for place in ("~/.local/bin", "~/.cargo/bin")]
    return shutil.which("uv", path=os.pathsep.join(places))


def make_venv(python: str, prefix: Path, env: dict[str, str], context: BuildContext, *options: str) -> None:
    """Make an empty environment; where ensurepip is missing (Debian without python3-venv), uv can."""
    try:
        context.run([python, "-I", "-m", "venv", *options, str(prefix)], env, what="python -m venv")
    except EnvironmentProblem:
        shutil.rmtree(str(prefix), ignore_errors=True)
        uv = find_uv(env)
        if uv is None:
            raise
        context.run([uv, "venv", "--python", python, str(prefix)], env, what="uv venv")


def _installer(python: str, env: dict[str, str]) -> list[str]:
    pip = Path(python).parent / "pip"
    if pip.exists():
        return [python, "-m", "pip", *PIP_OPTIONS]
    return [find_uv(env) or "uv", "pip", "install", "--python", python]


def with_bin(env: dict[str, str], folder: Path) -> dict[str, str]:
    """Return `env` with a folder first on its PATH."""
    return {**env, "PATH": os.pathsep.join([str(folder), env.get("PATH") or os.defpath])}


def wheels_in(folder: Path) -> list[Path]:
    """Return the wheels in a folder, which need not be there."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def failure_line(ran: HelperResult) -> str:
    """Return the line of a failed program's output that explains most."""
    if ran.status is None:
        return "it did not finish in time"
    lines = [line.strip() for line in ran.output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|not find|no such|\u00d7", line, re.IGNORECASE)]
    return (telling or lines or [f"exit status {ran.status}"])[-1][:400]


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
