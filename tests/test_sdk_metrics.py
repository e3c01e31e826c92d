"""Metrics of a growing run as curves and as pandas tables, through the real API."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.api import Api, serving
from support.api_use import start
from support.run_writer import history, run, write_run

import raylaunch
from raylaunch import Job
from raylaunch.sdk.dataframe import frame_of_csv

pytest.importorskip("pandas", reason="needs pandas: pip install 'raylaunch[notebook]'")
pytestmark = pytest.mark.wandb


@pytest.fixture
def job(api: Api) -> Iterator[Job]:
    """A job that has logged ten epochs, the accuracy in every second."""
    with raylaunch.connect("test", reach=api.reach()) as cluster:
        job = cluster.submit("python -m train", name="digits", working_dir="")
        start(api, job.view)
        rows = [history(n, {"loss": 1 / (n + 1), **({"acc": n / 10} if n % 2 else {})}) for n in range(10)]
        write_run(api.store / "jobs" / job.id / "attempt-1", [run(), *rows])
        yield job


def test_metrics_are_last_values_and_curves_of_all(job: Job) -> None:
    metrics = job.metrics()
    assert metrics.last["loss"] == pytest.approx(0.1)
    assert {series.key: series.total for series in metrics.series}["acc"] == 5


def test_a_table_has_a_row_a_step_and_a_column_a_metric(job: Job) -> None:
    frame = job.metrics_frame(["loss", "acc"])
    assert list(frame.columns) == ["acc", "loss"]
    assert list(frame.index) == list(range(10))
    assert frame["loss"].iloc[-1] == pytest.approx(0.1)
    assert math.isnan(frame["acc"].iloc[0])


def test_curves_become_the_same_table(job: Job) -> None:
    keys = ["loss", "acc"]
    assert job.metrics(keys).to_pandas().equals(job.metrics_frame(keys))


def test_a_card_draws_the_loss(job: Job) -> None:
    card = job.card()
    assert card.curve is not None
    assert (card.curve.key, len(card.curve.points)) == ("loss", 10)
    assert "<polyline" in job._repr_html_()


def test_a_job_is_shown_as_it_was_last_seen_when_the_cluster_is_gone(tmp_path: Path) -> None:
    with serving(tmp_path / "store") as api:
        cluster = raylaunch.connect("test", reach=api.reach())
        job = cluster.submit("python -m train", name="digits", working_dir="")
    assert "does not respond" in job._repr_html_()
    cluster.close()


def test_names_and_values_that_look_like_missing_ones_stay_what_they_are() -> None:
    frame = frame_of_csv(b"step,at,key,value\n0,1,NA,1.5\n0,1,null,inf\n1,1,NA,nan\n1,2,NA,2.5\n2,2,NA,nan\n")
    assert list(frame.columns) == ["NA", "null"]
    assert frame["null"].iloc[0] == math.inf
    assert frame["NA"].iloc[1] == 2.5
    assert math.isnan(frame["NA"].iloc[2])


def test_without_pandas_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "pandas.py").write_text("raise ImportError('no pandas here')\n")
    code = (
        "from raylaunch.sdk.dataframe import frame_of_csv\n"
        "from raylaunch.errors import RaylaunchError\n"
        "try:\n    frame_of_csv(b'')\nexcept RaylaunchError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == (
        "a table of metrics needs pandas, which is not installed here\n"
        "  → pip install 'raylaunch[notebook]'; or read the points without it: job.metrics().series\n"
    )
