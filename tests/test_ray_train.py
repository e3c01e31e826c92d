"""What Ray Train reports, on its way to W&B: the program that logs it, and the values that travel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.cluster import argv
from support.waiting import wait_until
from support.wandb_server import WandbServer

from raylaunch.tracking.run_file import History, RunExit, RunFile, RunInfo

pytestmark = pytest.mark.wandb


class Writer:
    """The program, started as the runner starts it, on a file of reports that a test writes."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.reports = folder / "reports.jsonl"
        (folder / "wandb").mkdir()
        self._done, done = os.pipe()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
        where = {"WANDB_DIR": str(folder), "WANDB_MODE": "offline", "HOME": str(folder), "WANDB_PROJECT": "digits"}
        with (folder / "out").open("wb") as out:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "raylaunch.tracking.train_writer", str(self.reports)],
                env={**kept, "WANDB_ERROR_REPORTING": "false", **where, **env},
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                pass_fds=[done],
            )
        os.close(done)
        assert self._child.wait(60) == 0

    def tell(self, event: str, run: str = "rl1", **facts: object) -> None:
        """Write what Ray Train's callback would write."""
        with self.reports.open("a") as file:
            file.write(json.dumps({"at": 0.0, "run": run, "event": event, **facts}) + "\n")

    def report(self, step: int, run: str = "rl1", **row: float) -> None:
        """Report a row."""
        self.tell("report", run, step=step, row=row)

    def finish(self, exit_code: int | None = None) -> None:
        """Say how the training ended (or nothing, as a killed runner would), and wait for the program's end."""
        assert self._child.stdin is not None
        if exit_code is not None:
            self._child.stdin.write(json.dumps({"exit_code": exit_code}).encode() + b"\n")
        self._child.stdin.close()
        os.set_blocking(self._done, False)
        wait_until(self._ended, 90, "the program has ended")
        os.close(self._done)

    def _ended(self) -> bool:
        try:
            return os.read(self._done, 1) == b""
        except BlockingIOError:
            return False

    def process(self) -> psutil.Process:
        """Return the program, which has left its parent."""
        marks = [process for process in psutil.process_iter() if str(self.reports) in argv(process)]
        assert len(marks) == 1
        return marks[0]

    def rows(self, run: str = "rl1") -> list[tuple[float, dict[str, float]]]:
        """Return the steps and values in the run's file."""
        return [(item.step, item.values) for item in self._items(run) if isinstance(item, History)]

    def exit_code(self, run: str = "rl1") -> int | None:
        """Return the status with which the run was finished."""
        return next((item.code for item in self._items(run) if isinstance(item, RunExit)), None)

    def info(self, run: str = "rl1") -> RunInfo:
        """Return who the run is."""
        return next(item for item in self._items(run) if isinstance(item, RunInfo))

    def _items(self, run: str) -> list[object]:
        files = (self.folder / "wandb").glob(f"*run-*/run-{run}.wandb")
        return [item for file in files for item in RunFile(file).stream()]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def test_reports_can_be_read_while_they_grow_and_the_run_ends_as_the_training_did(tmp_path: Path) -> None:
    writer = Writer(tmp_path, WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL="0.1")
    writer.tell("start", name="job-1", config={"lr": 0.1}, workers=2)
    writer.report(0, loss=1.0)
    wait_until(lambda: writer.rows() == [(0, {"loss": 1.0})], 60, "the first row is readable")
    writer.report(1, loss=0.5)
    writer.finish(143)
    assert [step for step, _ in writer.rows()] == [0, 1]
    assert writer.exit_code() == 143
    assert (writer.info().name, writer.info().project) == ("job-1", "digits")


def test_a_run_that_train_has_ended_is_finished_and_a_further_one_is_its_own(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for run, code in (("rl1", 0), ("rl1-2", 1)):
        writer.tell("start", run, name=run, config={}, workers=1)
        writer.report(0, run, loss=1.0)
        writer.tell("end", run, exit_code=code)
    writer.finish(0)
    assert (writer.exit_code("rl1"), writer.exit_code("rl1-2")) == (0, 1)


def test_without_reports_there_is_no_run(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.tell("start", name="job-1", config={}, workers=1)
    writer.tell("end", exit_code=0)
    writer.finish(0)
    assert not list((tmp_path / "wandb").glob("*run-*"))


def test_a_stop_that_reaches_all_processes_of_the_job_does_not_end_it(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.report(0, loss=1.0)
    wait_until(lambda: list((tmp_path / "wandb").glob("*run-*")), 60, "the run is open")
    process = writer.process()
    assert process.ppid() != os.getpid()
    assert process.name() == "wandb-reports"
    process.send_signal(signal.SIGTERM)
    writer.report(1, loss=0.5)
    writer.finish(0)
    assert [step for step, _ in writer.rows()] == [0, 1]


def test_when_the_runner_was_killed_the_run_ends_as_failed(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.report(0, loss=1.0)
    writer.finish()
    assert writer.rows() == [(0, {"loss": 1.0})]
    assert writer.exit_code() == 1


def test_on_line_the_server_has_each_row_once_and_the_status(tmp_path: Path, server: WandbServer) -> None:
    writer = Writer(tmp_path, WANDB_MODE="online", **server.netrc(tmp_path / "netrc"))
    writer.tell("start", name="job-1", config={"lr": 0.1}, workers=2)
    for step in range(3):
        writer.report(step, loss=1 / (step + 1))
    writer.finish(1)
    run = server.runs["rl1"]
    assert [(row["_step"], row["loss"]) for row in run.history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert (run.complete, run.exit_code) == (True, 1)
    assert f"View run at {server.url}/team/digits/runs/rl1" in (tmp_path / "out").read_text()


def test_a_training_that_restarts_continues_the_run_and_one_that_resumes_repeats_nothing(
    tmp_path: Path, server: WandbServer
) -> None:
    for attempt, steps in enumerate([range(3), range(2, 5), range(2)]):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        writer = Writer(folder, WANDB_MODE="online", **server.netrc(folder / "netrc"))
        for step in steps:
            writer.report(step, loss=float(attempt))
        writer.finish(1)
    rows = [(row["_step"], row["loss"]) for row in server.runs["rl1"].history]
    assert rows == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]


def test_an_init_that_fails_on_line_loses_no_report(tmp_path: Path, server: WandbServer) -> None:
    server.status = 403
    writer = Writer(tmp_path, WANDB_MODE="online", **server.netrc(tmp_path / "netrc"))
    writer.report(0, loss=1.0)
    writer.finish(0)
    assert writer.rows() == [(0, {"loss": 1.0})]
    assert "the training's reports are tracked offline" in (tmp_path / "out").read_text()


def test_any_value_that_is_reported_can_travel() -> None:
    pytest.importorskip("pyarrow", reason="needs Ray Train's libraries: pip install 'ray[train]'")
    from raylaunch.tracking.train_callback import plain_row  # noqa: PLC0415 -- it loads Ray

    row = plain_row(
        {
            "loss": np.float32(0.5),
            "step": np.int64(3),
            "nested": {"a": {"b": 1}, "c": True},
            "text": "x" * 5000,
            "list": [np.float64(1.5), 2],
            "array": np.zeros((2, 2)),
            "object": object,
            7: None,
        }
    )
    assert row["loss"] == 0.5
    assert repr(row["step"]) == "3"
    assert (row["nested/a/b"], row["nested/c"], row["7"]) == (1, True, None)
    assert len(str(row["text"])) == 1000
    assert row["list"] == [1.5, 2]
    assert isinstance(row["array"], str)
    json.dumps(row)
