"""The examples run as they stand, without a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = [
    pytest.mark.wandb,
    pytest.mark.skipif(
        importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn: pip install 'raylaunch[demo]'"
    ),
]


def _run(script: Path, *arguments: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "RAYLAUNCH_"))}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=environment | {"WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_digits_example_trains_by_itself_and_its_model_can_be_loaded_elsewhere(tmp_path: Path) -> None:
    output = _run(EXAMPLES / "digits/train.py", "--epochs", "8", cwd=tmp_path)
    assert "epoch   8/8" in output

    facts = json.loads((tmp_path / "model/model.json").read_text(encoding="utf-8"))
    measured = _run(EXAMPLES / "digits/evaluate.py", "model", cwd=tmp_path)
    assert measured == f"accuracy on held-out digits: {facts['accuracy']:.2f}\n"
    assert facts["accuracy"] > 0.9


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs PyTorch, which could not be installed here"
)
def test_the_torch_example_trains_and_prints_its_device(tmp_path: Path) -> None:
    output = _run(EXAMPLES / "torch_script/train.py", "--epochs", "2", cwd=tmp_path)
    assert "device: " in output
    assert "epoch   2/2" in output
    assert (tmp_path / "model/model.pt").stat().st_size > 0
