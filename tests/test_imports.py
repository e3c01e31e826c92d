"""The arrows of the design point down only, and a foreign library is known to one place.

The rules are read off `docs/architecture.md`; a new module must be given its place here.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("raylaunch", "mcp_server")

SPECS = frozenset({"spec", "cluster_spec", "host_spec", "spec_parts", "units"})
GROUND = (
    frozenset({"errors", "reasons", "version", "directory", "log_rotation", "job_state", "state"})
    | frozenset({"cluster_state", "wheel_sets"})
    | SPECS
)
READING = frozenset({"config", "ray_yaml", "spec_problems", "yaml_file"})
PACKING = frozenset({"packing", "ignoring", "sensitive", "fetched", "git_facts"})
SENDING = PACKING | {
    "downloads",
    "environment_choice",
    "local_projects",
    "submission",
    "transfer",
    "wire",
    "job_page",
    "log_reading",
    "requirement_lines",
}
VERBS = frozenset({"client", "sdk"})

# What each part may import of raylaunch, beside itself. `runner.contract` grants that one module.
MAY: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "reasons": frozenset(),
    "version": frozenset(),
    "directory": frozenset(),
    "log_rotation": frozenset(),
    **dict.fromkeys(SPECS, SPECS),
    "spec": SPECS | {"runner.contract", "runner.entrypoint"},
    "job_state": frozenset(),
    "wheel_sets": frozenset(),
    "state": frozenset({"job_state", "reasons", "spec", "spec_parts", "wheel_sets"}),
    "cluster_state": frozenset({"state", "spec_parts", "wheel_sets"}),
    **dict.fromkeys(READING, GROUND | READING | {"runner.shell_words"}),
    **dict.fromkeys(SENDING, GROUND | SENDING | {"log_view", "runner.contract", "runner.secret_files"}),
    "cluster": GROUND | {"runner.contract", "log_view"},
    "admin": GROUND | {"wire"},
    "parallel_download": GROUND | SENDING | {"cluster"},
    "requirement_lines": GROUND | {"cluster"},
    "job_wheels": GROUND | SENDING | {"cluster", "requirement_lines"},
    "job_files": GROUND | PACKING | {"runner.entrypoint", "runner.training"},
    "submitting": GROUND | SENDING | {"job_files", "job_wheels"},
    "client": GROUND | READING | SENDING | {"cluster", "admin", "parallel_download", "submitting"},
    "people": GROUND | READING | {"client", "cluster", "place"},
    "quieting": GROUND | {"client", "cluster", "place"},
    "members": GROUND | READING | {"client", "cluster", "place", "quieting"},
    "sdk": GROUND | READING | {"client", "cluster", "environment_choice", "sensitive", "place", "log_view", "quieting"},
    "place": GROUND | {"client", "cluster", "log_view", "runner.contract"},
    "log_view": frozenset(),
    "cli": GROUND
    | READING
    | VERBS
    | {"job_files", "sensitive", "cluster", "environment_choice", "job", "members", "people", "quieting", "place"}
    | {"log_view", "packing", "submitting"},
    "mcp_server": GROUND
    | READING
    | VERBS
    | {"packing", "sensitive", "cluster", "environment_choice", "place", "log_view"},
    "runner": frozenset({"errors", "tracking.frames", "tracking.wire"}),
    "job": frozenset({"runner.contract"}),
    "tracking": GROUND | {"runner.contract", "runner.wandb_runs"},
    "node": GROUND | {"runner.contract", "runner.unpack", "runner.processes"},
    "controller": GROUND | {"node", "tracking", "runner.contract", "runner.archive", "runner.rank_failure"},
    "__init__": GROUND | READING | VERBS | {"job"},
    "__main__": frozenset({"cli"}),
}

# A foreign library, and the only places that may import it.
KNOWN_TO: dict[str, tuple[str, ...]] = {
    "asyncssh": tuple(
        f"raylaunch/cluster/ssh/{name}.py"
        for name in ("machine", "connect", "host_keys", "identities", "places", "talk")
    ),
    "ray": (
        "raylaunch/cluster/ray_start.py",
        "raylaunch/tracking/train_callback.py",
        "raylaunch/controller/ray_calls.py",
        "raylaunch/controller/ray_jobs.py",
        "raylaunch/controller/ray_link.py",
        "raylaunch/node/",
    ),
    "wandb": ("raylaunch/tracking/",),
    "mcp": ("mcp_server/",),
    "httpx2": ("raylaunch/wire.py", "raylaunch/controller/ray_jobs.py"),
    "fastapi": ("raylaunch/controller/",),
    "uvicorn": ("raylaunch/controller/",),
    "re2": ("raylaunch/controller/logs.py",),
    "rich": ("raylaunch/cli/",),
    "pandas": ("raylaunch/sdk/",),
    "click": ("raylaunch/cli/",),
}
STDLIB_ONLY = ("raylaunch/runner/", "raylaunch/cluster/installer/", "raylaunch/job.py", "raylaunch/__init__.py")


class Import(NamedTuple):
    """One imported module, as a dotted name, and where."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def _files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def _imports(path: Path) -> Iterator[Import]:
    file = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (Import(file, node.lineno, name.name) for name in names)
            case ast.ImportFrom(level=0, module=str(module), names=names):
                dotted = (f"{module}.{name.name}" for name in names)
                yield from (Import(file, node.lineno, name if _is_module(name) else module) for name in dotted)
            case ast.ImportFrom():
                yield Import(file, node.lineno, "." * node.level + (node.module or ""))
            case _:
                pass


@functools.cache
def _all_imports() -> list[Import]:
    return [found for path in _files() for found in _imports(path)]


def _part(file: str) -> str:
    package, *rest = Path(file).with_suffix("").parts
    return package if package == "mcp_server" else rest[0]


def _of_ours(module: str) -> str:
    """Return an import of ours without the package's name (``cluster.home``, ``errors``), and "" for a foreign one."""
    package, _, inner = module.partition(".")
    if package == "mcp_server":
        return "mcp_server"
    return (inner or "__init__") if package == "raylaunch" else ""


def test_every_module_has_its_place_in_the_picture() -> None:
    parts = {_part(path.relative_to(ROOT).as_posix()) for path in _files()}
    assert parts <= MAY.keys(), f"give these a place in MAY: {sorted(parts - MAY.keys())}"


def test_arrows_point_down_only() -> None:
    wrong = []
    for found in _all_imports():
        part, target = _part(found.file), _of_ours(found.module)
        if not target or target in {"__init__", "mcp_server"}:
            continue
        top = target.split(".")[0]
        if top != part and not {top, target, ".".join(target.split(".")[:2])} & MAY.get(part, frozenset()):
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_raylaunch_never_imports_the_mcp_server() -> None:
    assert not [
        str(found)
        for found in _all_imports()
        if found.file.startswith("raylaunch/") and _of_ours(found.module) == "mcp_server"
    ]


def test_imports_are_absolute() -> None:
    assert not [str(found) for found in _all_imports() if found.module.startswith(".")]


@pytest.mark.parametrize("library", sorted(KNOWN_TO))
def test_a_foreign_library_is_known_to_one_place(library: str) -> None:
    wrong = [
        str(found)
        for found in _all_imports()
        if found.module.split(".")[0] == library and not found.file.startswith(KNOWN_TO[library])
    ]
    assert not wrong, "\n".join(wrong)


def test_what_runs_inside_a_job_needs_the_standard_library_only() -> None:
    wrong = [
        str(found)
        for found in _all_imports()
        if found.file.startswith(STDLIB_ONLY)
        and not found.module.startswith(("raylaunch", "mcp_server"))
        and found.module.split(".")[0] not in sys.stdlib_module_names
    ]
    assert not wrong, "\n".join(wrong)


def _loaded_by(*arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "raylaunch", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


def test_asking_for_help_loads_nothing_heavy() -> None:
    loaded = _loaded_by("list", "--help")
    assert "click" in loaded
    assert not loaded & {"ray", "wandb", "asyncssh", "mcp", "fastapi", "numpy"}
