"""Environments laid over others: packages that a job adds, and the projects in its own working directory.

A layer is a virtual environment whose ``.pth`` file adds the packages below it, which stay as they are. Console scripts
of an environment below are written again for the layer's interpreter, so that ``torchrun`` finds what the layer adds.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from raylaunch.runner.environments.build import (
    PIP_OPTIONS,
    BuildContext,
    EnvironmentProblem,
    PreparedEnvironment,
    find_uv,
    make_venv,
    prefix_of,
    wheels_in,
    with_bin,
    without_other_pythons,
)
from raylaunch.runner.environments.probe import ask

_LARGEST_SCRIPT = 64 * 1024
_ADD_SITE = "import site; site.addsitedir({site!r})\n"
_SITES = """
import json, sys
print("\\n@raylaunch " + json.dumps(
    {"sites": [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]}))
"""


def with_packages(below: PreparedEnvironment, packages: Sequence[str], context: BuildContext) -> PreparedEnvironment:
    """Return an environment with more packages, made once for what is below and what is added.

    Raises:
        EnvironmentProblem: the environment has no Python, or the installation failed.
    """
    sites = _sites(below, context)
    state = [(site, Path(site).stat().st_mtime_ns) for site in sites if Path(site).is_dir()]
    wheels = [f"{one.name} {one.readlink()}" for one in (*wheels_in(context.wheels), *wheels_in(context.added_wheels))]
    prefix = prefix_of("with", repr((below.python, state, sorted(packages), wheels)), context)
    with context.building(prefix) as needed:
        if needed:
            _make_layer(prefix, below, sites, context)
            python = str(prefix / "bin" / "python")
            command = [*_pip(python, below), *_offline_options(context), *packages]
            what = "the installation of the added packages"
            try:
                context.run(command, without_other_pythons(below.env), what=what)
            except EnvironmentProblem as problem:
                msg = f"{problem}{_python_mismatch_hint(prefix, context)}"
                raise EnvironmentProblem(msg) from None
    return _layered(prefix, below, sites)


def with_projects(below: PreparedEnvironment, lines: Sequence[str], context: BuildContext) -> PreparedEnvironment:
    """Return an attempt's own environment, with the projects of its working directory installed from these lines.

    Raises:
        EnvironmentProblem: one of them cannot be built.
    """
    prefix = context.tmp / "environment"
    sites = _sites(below, context)
    _make_layer(prefix, below, sites, context)
    listed = context.tmp / "projects.txt"
    listed.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    python = str(prefix / "bin" / "python")
    env = without_other_pythons(below.env)
    uv = find_uv(env)
    install = [uv, "pip", "install", "--python", python] if uv else _pip(python, below)
    command = [*install, *_offline_options(context, builds=True), "--no-deps", "-r", str(listed)]
    context.run(command, env, what="the installation of the projects in the working directory")
    return _layered(prefix, below, sites)


def _python_mismatch_hint(prefix: Path, context: BuildContext) -> str:
    """Return advice when the wheels sent with the job are for another Python than the environment's."""
    ours = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    theirs = next((one.name for one in prefix.glob("lib/python3*")), ours)
    if not context.offline or theirs == ours:
        return ""
    return (
        f"; this node cannot reach a package index, and the wheels are for {ours}, but the environment has {theirs}: "
        "give its full path (venv:/PATH, conda:/PATH), then wheels for its Python are sent"
    )


def _make_layer(prefix: Path, below: PreparedEnvironment, sites: Sequence[str], context: BuildContext) -> None:
    make_venv(below.python, prefix, without_other_pythons(below.env), context, "--without-pip")
    own = next(prefix.glob("lib/python3*/site-packages"))
    (own / "_raylaunch_below.pth").write_text("".join(_ADD_SITE.format(site=site) for site in sites), encoding="utf-8")
    _rewrite_scripts(Path(below.python).parent, prefix / "bin")


def _rewrite_scripts(below: Path, folder: Path) -> None:
    """Copy console scripts of an environment; those of a system interpreter are not copied."""
    if not any((below.parent / name).exists() for name in ("pyvenv.cfg", "conda-meta")):
        return
    interpreter = re.compile(re.escape(str(below).encode()) + rb"/python[0-9.]*")
    own = str(folder / "python").encode()
    for script in below.iterdir():
        if (folder / script.name).exists() or not script.is_file() or script.stat().st_size > _LARGEST_SCRIPT:
            continue
        content = script.read_bytes()
        head, newline, rest = content.partition(b"\nimport ")
        if content.startswith(b"#!") and newline and interpreter.search(head):
            (folder / script.name).write_bytes(interpreter.sub(own, head) + newline + rest)
            (folder / script.name).chmod(0o755)


def _layered(prefix: Path, below: PreparedEnvironment, sites: Sequence[str]) -> PreparedEnvironment:
    env = with_bin(below.env, prefix / "bin")
    env["VIRTUAL_ENV"] = str(prefix)
    env.pop("PYTHONHOME", None)
    return PreparedEnvironment(env, str(prefix / "bin" / "python"), tuple(sites))


def _sites(below: PreparedEnvironment, context: BuildContext) -> list[str]:
    """Return where an interpreter's packages are."""
    if not below.python:
        msg = "packages cannot be added to an environment without Python"
        raise EnvironmentProblem(msg)
    return cast("list[str]", ask(below.python, _SITES, without_other_pythons(below.env), context)["sites"])


def _pip(python: str, below: PreparedEnvironment) -> list[str]:
    """Return a pip that runs under the layer's interpreter, and so sees what is installed below."""
    sites = [*map(Path, below.sites), *_own_sites(below)]
    if any((site / "pip" / "__main__.py").exists() for site in sites):
        return [python, "-m", "pip", *PIP_OPTIONS]
    carrier = importlib.util.find_spec("virtualenv")
    folder = Path(str(carrier.origin)).parent / "seed" / "wheels" / "embed" if carrier and carrier.origin else None
    wheels = sorted(folder.glob("pip-*.whl"), key=_release) if folder else []
    if wheels:
        return [python, str(wheels[-1] / "pip"), *PIP_OPTIONS]
    uv = find_uv(below.env)
    if uv:
        return [uv, "pip", "install", "--python", python]
    msg = "packages cannot be added on this node: it has neither pip nor uv"
    raise EnvironmentProblem(msg)


def _own_sites(below: PreparedEnvironment) -> list[Path]:
    return sorted(Path(below.python).parent.parent.glob("lib*/python3*/*-packages"))


def _release(wheel: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in wheel.name.split("-")[1].split(".") if part.isdigit())


def _offline_options(context: BuildContext, *, builds: bool = False) -> list[str]:
    """Return options that keep pip and uv off the index, where the node cannot reach one and wheels were sent."""
    sources = [context.build_wheels] if builds else [context.added_wheels, context.wheels]
    if not context.offline:
        return []
    links = [word for folder in sources if folder.is_dir() for word in ("--find-links", str(folder))]
    return ["--no-index", *links]
