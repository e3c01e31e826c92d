"""The example notebook runs as it stands, with a real kernel, on a real cluster."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import pytest
from support.cluster import Cluster

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "notebook.ipynb"

EXECUTE = """
import sys
import nbclient, nbformat

notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


class Cell(TypedDict, total=False):
    cell_type: str
    source: list[str]
    outputs: list[dict[str, object]]
    execution_count: int | None


def code_cells(notebook: Path) -> list[Cell]:
    cells: list[Cell] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def shown(cell: Cell) -> str:
    """Return everything that a cell shows, as text."""
    return json.dumps(cell["outputs"], ensure_ascii=False)


def test_the_notebook_is_six_lines_and_is_kept_without_outputs() -> None:
    cells = code_cells(NOTEBOOK)
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines() if line.strip()]
    assert len([line for line in lines if line != "job"]) == 6
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]


@pytest.mark.ray
@pytest.mark.wandb
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sklearn", "nbclient", "ipykernel", "pandas")),
    reason="needs what notebooks need: pip install 'raylaunch[demo,dev]'",
)
def test_the_notebook_trains_shows_and_evaluates(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "digits", tmp_path / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    notebook = Path(shutil.copy(NOTEBOOK, tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, notebook.name],
        cwd=tmp_path,
        env=cluster.env | {"IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_PLATFORM_DIRS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    submitted, result, metrics, downloaded, evaluated = (shown(cell) for cell in code_cells(notebook))
    assert "<b>digits-" in submitted
    assert "model.npz" in result
    assert "<svg" in metrics
    assert "loss" in metrics
    assert "verified=True" in downloaded
    assert "accuracy on held-out digits: 0.9" in evaluated
    assert (tmp_path / "model" / "model.npz").stat().st_size > 0
