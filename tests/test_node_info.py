from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raylaunch.agent.node_info import describe
from raylaunch.contract import VAR_NODE_ROOT

SCRIPT = """#!/bin/sh
case "$1" in
*query-gpu*)
  echo '0, GPU-aaa, NVIDIA H100 80GB HBM3, 81559, 1024, 37'
  echo '1, GPU-bbb, NVIDIA GB10, [N/A], [N/A], [N/A]';;
*) printf '%s' "$APPS";;
esac
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(SCRIPT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("APPS", "")


@pytest.mark.usefixtures("nvidia_smi")
def test_gpus_are_described_and_unknown_numbers_are_none(tmp_path: Path) -> None:
    first, second = describe(tmp_path / "node").gpus
    assert (first["index"], first["uuid"], first["name"]) == ("0", "GPU-aaa", "NVIDIA H100 80GB HBM3")
    assert (first["memory_total"], first["memory_used"], first["utilization"]) == (81559 << 20, 1024 << 20, 37)
    assert (second["memory_total"], second["memory_used"], second["utilization"]) == (None, None, None)


@pytest.mark.usefixtures("nvidia_smi")
def test_only_processes_outside_this_cluster_are_said_to_use_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = [sys.executable, "-c", "input()"]
    ours = {**os.environ, VAR_NODE_ROOT: str(tmp_path / "node")}
    with (
        subprocess.Popen(sleep, stdin=subprocess.PIPE) as other,
        subprocess.Popen(sleep, stdin=subprocess.PIPE, env=ours) as own,
    ):
        apps = f"GPU-aaa, {other.pid}, /usr/bin/python3\nGPU-aaa, {own.pid}, python3\n"
        monkeypatch.setenv("APPS", apps)
        first, second = describe(tmp_path / "node").gpus
        other.kill()
        own.kill()
    assert len(first["processes"]) == 1
    assert first["processes"][0].endswith(f":{other.pid}:python3")
    assert second["processes"] == []


@pytest.mark.usefixtures("nvidia_smi")
def test_a_broken_nvidia_smi_is_said_and_hides_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    facts = describe(tmp_path / "node")
    assert facts.gpus == []
    assert "9" in facts.gpu_problem
    assert facts.disk_free > 0
