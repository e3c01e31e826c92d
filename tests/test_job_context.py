"""`raylaunch.job`: what user code may import, in a job and outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import raylaunch
from raylaunch import contract


def test_outside_a_job_the_context_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = raylaunch.context()
    assert not found.in_job
    assert (found.job, found.attempt, found.rank, found.world_size) == ("", 0, 0, 1)
    assert found.output_dir == tmp_path / "outputs"
    assert found.checkpoint_dir.is_dir()


def test_in_a_job_the_context_says_what_the_runner_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.VAR_ATTEMPT, "c/digits-aaaaaa-2")
    monkeypatch.setenv(contract.VAR_JOB, "digits-aaaaaa")
    monkeypatch.setenv(contract.VAR_ATTEMPT_N, "2")
    monkeypatch.setenv(contract.VAR_OUTPUT_DIR, str(tmp_path / "out"))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = raylaunch.context()
    assert found.in_job
    assert (found.job, found.attempt, found.rank, found.world_size) == ("digits-aaaaaa", 2, 3, 8)
    assert found.output_dir == tmp_path / "out"


def test_a_report_is_one_line_with_step_total_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.VAR_PROGRESS, str(tmp_path / "progress.jsonl"))
    raylaunch.report({"loss": 0.5}, step=1, total=10)
    raylaunch.report(step=2, accuracy=1)
    first, second = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert (first["step"], first["total"], first["metrics"]) == (1, 10, {"loss": 0.5})
    assert (second["step"], second["total"], second["metrics"]) == (2, None, {"accuracy": 1.0})


def test_a_report_that_cannot_be_written_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.VAR_PROGRESS, "/nowhere/at/all/progress.jsonl")
    raylaunch.report({"loss": 1.0}, step=1)


def test_a_metric_that_is_no_number_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.VAR_PROGRESS, str(tmp_path / "progress.jsonl"))
    metrics: dict[str, Any] = {"loss": 1.0, "name": "resnet"}
    raylaunch.report(metrics, step=1)
    assert json.loads((tmp_path / "progress.jsonl").read_text())["metrics"] == {"loss": 1.0}


def test_other_ranks_report_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.VAR_PROGRESS, str(tmp_path / "progress.jsonl"))
    monkeypatch.setenv("RANK", "1")
    raylaunch.report(step=1)
    assert not (tmp_path / "progress.jsonl").exists()


def test_importing_raylaunch_loads_nothing_heavy() -> None:
    program = (
        "import sys, raylaunch; raylaunch.context; "
        "print([n for n in ('ray', 'wandb', 'pydantic', 'httpx2', 'click', 'asyncssh') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'contxt'"):
        _ = getattr(raylaunch, "contxt")  # noqa: B009 -- the name is wrong on purpose
