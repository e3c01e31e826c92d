"""Claude Code's own command line connects to the server. Run by ``make test-clients``, with an empty HOME.

Its commands exit 0 even when a server fails, so their text is read.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.node import node, program

ROOT = Path(__file__).resolve().parents[1]
SERVER = Path(sys.executable).with_name("raylaunch-mcp")


def claude(home: Path, project: Path, *words: str) -> str:
    """Run ``claude`` with an environment that holds nothing but HOME and PATH; return what it printed."""
    done = subprocess.run(
        [program("claude", "claude"), *words],
        cwd=project,
        env={"HOME": str(home), "PATH": f"{node().parent}:/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("options", [[], ["-e", "RAYLAUNCH_ROLE=viewer"]], ids=["trainer", "viewer"])
def test_the_server_is_added_and_connects(home: Path, project: Path, options: list[str]) -> None:
    claude(home, project, "mcp", "add", "raylaunch", *options, "--", str(SERVER))
    assert f"raylaunch: {SERVER}  - ✔ Connected" in claude(home, project, "mcp", "list")
    assert "Status: ✔ Connected" in claude(home, project, "mcp", "get", "raylaunch")


def test_a_server_that_cannot_start_is_recognized(home: Path, project: Path) -> None:
    claude(home, project, "mcp", "add", "raylaunch", "-e", "RAYLAUNCH_ROLE=nonsense", "--", str(SERVER))
    assert "✔ Connected" not in claude(home, project, "mcp", "list")


def test_the_file_of_the_repository_works_once_it_is_approved(home: Path, project: Path) -> None:
    shutil.copy(ROOT / ".mcp.json", project)
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "raylaunch-mcp").symlink_to(SERVER)
    approved = {"hasTrustDialogAccepted": True, "enabledMcpjsonServers": ["raylaunch"]}
    (home / ".claude.json").write_text(json.dumps({"projects": {str(project): approved}}))
    assert "✔ Connected" in claude(home, project, "mcp", "get", "raylaunch")
