"""What starts a keeper at boot: systemd's units, as systemd itself reads them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from raylaunch.cluster.local.autostart import unit_text
from raylaunch.paths import cluster_paths

ANALYZE = shutil.which("systemd-analyze")


def lines_of(text: str, key: str) -> list[str]:
    return [line.removeprefix(f"{key}=") for line in text.splitlines() if line.startswith(f"{key}=")]


@pytest.mark.skipif(ANALYZE is None, reason="needs systemd-analyze, which is not installed here")
@pytest.mark.parametrize("user", ["", "root"], ids=["user unit", "system unit"])
@pytest.mark.parametrize("folder", ["plain", "a b", "100%h", "cash$HOME", "back\\slash"])
def test_systemd_accepts_the_unit(user: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLAUNCH_HOME", str(tmp_path / folder))
    unit = tmp_path / "raylaunch-lab.service"
    unit.write_text(unit_text(cluster_paths("lab"), user=user))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert ANALYZE is not None
    scope = [] if user else ["--user"]
    done = subprocess.run(
        [ANALYZE, "verify", *scope, "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_special_characters_of_systemd_in_the_home_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLAUNCH_HOME", str(tmp_path / "100%h of $it"))
    text = unit_text(cluster_paths("lab"))
    assert f'"RAYLAUNCH_HOME={tmp_path}/100%%h of $it"' in lines_of(text, "Environment")
    assert lines_of(text, "ExecStart")[0].endswith('"-m" "raylaunch.cluster.keep" "lab"')


def test_the_unit_controls_only_the_watchdog_and_restarts_only_a_failed_one() -> None:
    text = unit_text(cluster_paths("lab"), user="ml")
    assert lines_of(text, "KillMode") == ["process"]
    assert lines_of(text, "Restart") == ["on-failure"]
    assert lines_of(text, "User") == ["ml"]
    assert lines_of(text, "After") == lines_of(text, "Wants") == ["network-online.target"]
    assert lines_of(unit_text(cluster_paths("lab")), "After") == []
