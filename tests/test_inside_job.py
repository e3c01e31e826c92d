"""Inside a job no interface reaches or starts a cluster: a second Ray would outlive the job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.agent import agent_at, environment
from support.cli import run_cli

from raylaunch.contract import VAR_JOB

SAID = "this is inside job digits-k3f9qa"


def inside(home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a job's program does, with a home where nothing runs."""
    env = environment(home, {VAR_JOB: "digits-k3f9qa"})
    return subprocess.run(
        [sys.executable, *argv], cwd=home, env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("command", ["run -- true", "up", "list", "doctor", "down", "switch", "join a --head b"])
def test_the_command_line_refuses_with_the_reason(tmp_path: Path, command: str) -> None:
    done = run_cli(command.split(), cwd=tmp_path, env=environment(tmp_path, {VAR_JOB: "digits-k3f9qa"}))
    assert done.returncode == 1, done.stderr
    assert SAID in done.stderr
    assert "raylaunch.report()" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--version"], ["run", "--help"]])
def test_help_and_version_are_still_printed(tmp_path: Path, words: list[str]) -> None:
    assert run_cli(words, cwd=tmp_path, env=environment(tmp_path, {VAR_JOB: "digits-k3f9qa"})).returncode == 0


@pytest.mark.parametrize("call", ["raylaunch.connect()", "raylaunch.Cluster.up()"])
def test_the_sdk_refuses_and_what_jobs_use_of_it_works(tmp_path: Path, call: str) -> None:
    done = inside(tmp_path, "-c", f"import raylaunch\nprint(raylaunch.context().job)\n{call}")
    assert done.stdout == "digits-k3f9qa\n"
    assert f"ClusterError: {SAID}" in done.stderr


def test_an_agents_tools_refuse(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with agent_at(tmp_path, tmp_path / "work", extra={VAR_JOB: "digits-k3f9qa"}) as agent:
        for tool in ("train_job", "list_jobs", "cluster_status"):
            answer = agent.call_with(tool, {"entrypoint": "true"} if tool == "train_job" else {})
            assert answer.error
            assert SAID in answer.text
