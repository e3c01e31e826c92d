"""How the code is laid out: folders, small modules, names, and what a command loads. Imports: `make style`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_IN_A_FOLDER = 16
SMALL, LARGE = 80, 500
SMALL_ON_PURPOSE = {
    "raylaunch/__main__.py": "python -m raylaunch",
    "raylaunch/agent/inotify.py": "the one place that knows the kernel's interface",
    "raylaunch/cluster/keep.py": "a program's name that other versions know",
    "raylaunch/cluster/on_host.py": "a program's name that other versions know",
    "raylaunch/cluster/ray_start.py": "a program's name that other versions know",
    "raylaunch/cluster/reach/tunnel.py": "a program's name that other versions know",
    "raylaunch/cluster/revive.py": "a program's name that other versions know",
    "raylaunch/controller/ray/release.py": "a program that sets Ray's environment before it imports Ray",
    "raylaunch/controller/settings.py": "the configuration file of one process",
    "raylaunch/runner/launchers/rank.py": "runs in each rank, and loads nothing else",
    "raylaunch/version.py": "read by the build",
}


def _modules() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "raylaunch/*.py", "mcp_server/*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    files = (name for name in done.stdout.split() if (ROOT / name).is_file())
    return sorted(name for name in files if not name.endswith("__init__.py"))


def test_no_folder_has_more_than_sixteen_modules() -> None:
    folders: dict[str, int] = defaultdict(int)
    for name in _modules():
        folders[str(Path(name).parent)] += 1
    assert not {folder: count for folder, count in folders.items() if count > MOST_IN_A_FOLDER}


def test_each_module_holds_one_thought() -> None:
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in _modules()}
    small = {name for name, count in lines.items() if count < SMALL}
    assert small == SMALL_ON_PURPOSE.keys()
    assert not {name: count for name, count in lines.items() if count > LARGE}


def test_a_public_class_name_exists_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for name in _modules():
        for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_help_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "raylaunch", "list", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in lines}
    assert "click" in loaded
    assert not loaded & {"ray", "wandb", "asyncssh", "mcp", "fastapi", "numpy"}
