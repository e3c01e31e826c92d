"""The Python environment of a job, in its seven kinds: its variables and interpreter, or what is missing."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from raylaunch.runner.environments import build, layers
from raylaunch.runner.environments.build import BuildContext, PreparedEnvironment, with_bin
from raylaunch.runner.environments.local_sources import local_packages

if TYPE_CHECKING:
    from raylaunch.contract import EnvironmentSpec

_CONDA_PLACES = ("miniforge3", "miniconda3", "anaconda3", "mambaforge", "conda")
_CONDA_ROOTS = ("~", "/opt", "/usr/local")
_CONDA_S = 120.0


def prepare(spec: EnvironmentSpec, env: dict[str, str], context: BuildContext) -> PreparedEnvironment:
    """Return the variables and the interpreter of this environment, made first if it is one that is made.

    Args:
        spec: kind and value.
        env: the variables that it starts from; not changed.
        context: the attempt's folders and heartbeat.

    Raises:
        EnvironmentProblem: it is not there or cannot be made.
        StopRequested: the attempt is to stop.
    """
    packages = spec.get("packages", [])
    if spec["kind"] == "uv":
        return _from_lock(packages, env, context)
    if spec["kind"] == "pip":
        return _from_requirements(spec, packages, env, context)
    prepared = _existing(spec, env, context)
    return layers.with_packages(prepared, packages, context) if packages else prepared


def _existing(spec: EnvironmentSpec, env: dict[str, str], context: BuildContext) -> PreparedEnvironment:
    kind, value = spec["kind"], spec["value"]
    if kind in {"default", "ray"}:
        return PreparedEnvironment(with_bin(env, Path(sys.executable).parent), sys.executable)
    if kind == "python":
        return _interpreter(value, env, context)
    if kind == "venv":
        return activate(_folder(value, context.code), env, what=f"venv:{value}")
    if kind == "conda":
        return _conda(value, env, context)
    msg = f"this runner does not know environments of kind {kind!r}; upgrade the cluster: raylaunch up"
    raise build.EnvironmentProblem(msg)


def _from_lock(packages: list[str], env: dict[str, str], context: BuildContext) -> PreparedEnvironment:
    """Return what ``uv run`` would make: what the lock pins, with the project and local dependencies installed."""
    prepared = activate(build.uv_environment(env, context), env, what="uv")
    if packages:
        prepared = layers.with_packages(prepared, packages, context)
    _, installed = local_packages((context.code / "uv.lock").read_text(encoding="utf-8", errors="replace"))
    if not installed:
        return _with_project(prepared, context.code)
    return layers.with_projects(prepared, build.projects_of_lock(env, context), context)


def _from_requirements(
    spec: EnvironmentSpec, packages: list[str], env: dict[str, str], context: BuildContext
) -> PreparedEnvironment:
    required = build.requirements_of(spec, context)
    prepared = activate(build.pip_environment(required, env, context), env, what="pip")
    if packages:
        prepared = layers.with_packages(prepared, packages, context)
    return layers.with_projects(prepared, required.local, context) if required.local else prepared


def activate(prefix: Path, env: dict[str, str], *, what: str) -> PreparedEnvironment:
    """Return what ``source bin/activate`` would make of `env`."""
    python = prefix / "bin" / "python"
    if not prefix.is_dir():
        msg = f"the environment {what} does not exist on this node: no folder {prefix}"
        raise build.EnvironmentProblem(msg)
    if not python.exists():
        broken = " (a link to an interpreter that no longer exists)" if python.is_symlink() else ""
        why = f"it has no bin/python{broken}"
        msg = f"{prefix} is not a Python environment: {why}; create it with: python3 -m venv {prefix}"
        raise build.EnvironmentProblem(msg)
    changed = with_bin(env, prefix / "bin")
    changed["VIRTUAL_ENV"] = str(prefix)
    changed.pop("PYTHONHOME", None)
    return PreparedEnvironment(changed, str(python))


def _folder(value: str, code: Path) -> Path:
    return Path(os.path.normpath(code / Path(value).expanduser()))


def _interpreter(value: str, env: dict[str, str], context: BuildContext) -> PreparedEnvironment:
    if "/" in value or value.startswith("~"):
        python = _folder(value, context.code)
        if not python.is_file():
            msg = f"the interpreter {value} does not exist on this node{_other_interpreters(python)}"
            raise build.EnvironmentProblem(msg)
        if not os.access(str(python), os.X_OK):
            msg = f"the interpreter {value} is not executable"
            raise build.EnvironmentProblem(msg)
    else:
        found = shutil.which(value, path=env.get("PATH") or os.defpath)
        if found is None:
            msg = f"the interpreter {value!r} is not on the PATH of this node; give its full path"
            raise build.EnvironmentProblem(msg)
        python = Path(found)
    changed = with_bin(env, python.parent)
    changed.pop("PYTHONHOME", None)
    if (python.parent.parent / "pyvenv.cfg").exists():
        changed["VIRTUAL_ENV"] = str(python.parent.parent)
    if python.name != "python":
        changed = with_bin(changed, _named_python(python, context.tmp))
    return PreparedEnvironment(changed, str(python))


def _named_python(python: Path, tmp: Path) -> Path:
    """Make a folder where ``python`` and ``python3`` are this interpreter; a link would hide its environment."""
    folder = tmp / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("python", "python3"):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(str(python))} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    return folder


def _other_interpreters(python: Path) -> str:
    """Name the interpreters next to one that does not exist."""
    others = sorted(str(path) for path in python.parent.glob("python3*") if "-" not in path.name)
    return f"; there are: {', '.join(others[:4])}" if others else ""


def _conda(name: str, env: dict[str, str], context: BuildContext) -> PreparedEnvironment:
    """Capture what ``conda activate`` makes of the variables."""
    conda = find_conda(env)
    if conda is None and (Path(name) / "conda-meta").is_dir():  # made by micromamba, or conda is not on Ray's PATH
        return _conda_by_folder(Path(name), env, context)
    if conda is None:
        msg = f"conda:{name} needs conda, which this node has neither on PATH nor in the usual places; set CONDA_EXE"
        raise build.EnvironmentProblem(msg)
    hook = f'eval "$({shlex.quote(conda)} shell.bash hook)" && conda activate {shlex.quote(name)}'
    return _capture(name, hook, env, context)


def _conda_by_folder(prefix: Path, env: dict[str, str], context: BuildContext) -> PreparedEnvironment:
    """Capture what ``conda activate`` would make, without conda: variables, PATH and the scripts of its packages."""
    scripts = sorted((prefix / "etc/conda/activate.d").glob("*.sh"))
    hook = " && ".join([":", *(f". {shlex.quote(str(script))}" for script in scripts)])
    before = {"CONDA_PREFIX": str(prefix), "CONDA_DEFAULT_ENV": prefix.name}
    return _capture(str(prefix), hook, {**with_bin(env, prefix / "bin"), **before}, context)


def _capture(name: str, activate: str, env: dict[str, str], context: BuildContext) -> PreparedEnvironment:
    """Return the variables that a shell has after `activate`."""
    captured = context.tmp / "conda-env"
    script = f"{activate} && command env -0 > {shlex.quote(str(captured))}"
    try:
        context.run(["bash", "-c", script], env, what=f"conda activate {name}", timeout_s=_CONDA_S)
    except build.EnvironmentProblem as problem:
        msg = f"{problem}; list them: conda env list"
        raise build.EnvironmentProblem(msg) from None
    words = captured.read_bytes().decode("utf-8", "surrogateescape").split("\0")
    captured.unlink()
    found = dict(word.split("=", 1) for word in words if "=" in word)
    for transient in ("_", "SHLVL", "PWD", "OLDPWD"):
        found.pop(transient, None)
    python = shutil.which("python", path=str(Path(found.get("CONDA_PREFIX", "/nowhere")) / "bin"))
    return PreparedEnvironment(found, python or "")


def find_conda(env: dict[str, str]) -> str | None:
    """Return conda's program: CONDA_EXE, PATH, or a usual place."""
    given = env.get("CONDA_EXE")
    if given and os.access(given, os.X_OK):
        return given
    on_path = shutil.which("conda", path=env.get("PATH") or os.defpath)
    if on_path:
        return on_path
    for root in _CONDA_ROOTS:
        for place in _CONDA_PLACES:
            program = Path(root).expanduser() / place / "bin" / "conda"
            if os.access(str(program), os.X_OK):
                return str(program)
    return None


def _with_project(prepared: PreparedEnvironment, code: Path) -> PreparedEnvironment:
    """Let a project without a build system import what it has: nothing of it is installed."""
    sources = [code / "src"] if (code / "src").is_dir() and not (code / "src" / "__init__.py").exists() else []
    before = prepared.env.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, (*sources, code)), *([before] if before else [])])
    return prepared._replace(env={**prepared.env, "PYTHONPATH": path})
