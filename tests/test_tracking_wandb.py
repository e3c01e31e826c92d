"""Real runs of wandb, online against a stand-in server and offline, read from their files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.signals import send_group
from support.store import job_view
from support.waiting import wait_until
from support.wandb_server import WandbServer

from raylaunch.controller.metrics.reader import MetricsStore
from raylaunch.tracking.run_file import History, RunExit, RunFile

pytestmark = pytest.mark.wandb

FLUSH = {"WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.25"}
LOG_FIVE = "run = wandb.init(project='digits')\nfor n in range(5): run.log({'loss': 1 / (n + 1)})\nrun.finish()\n"
ONE_THEN_WAIT = (
    "run = wandb.init(project='digits')\nrun.log({'loss': 0.5})\nprint('logged', flush=True)\nsys.stdin.readline()\n"
)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def _environment(folder: Path, extra: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    home = folder / "home"
    for path in (folder / "wandb", home):
        path.mkdir(parents=True, exist_ok=True)
    where = {"WANDB_DIR": str(folder), "HOME": str(home), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    return {**kept, **where, "WANDB_ERROR_REPORTING": "false", **extra}


def _run(folder: Path, code: str, extra: Mapping[str, str]) -> None:
    program = [sys.executable, "-c", f"import sys, wandb\n{code}"]
    subprocess.run(program, env=_environment(folder, extra), cwd=folder, check=True, timeout=120)


def _start(folder: Path, code: str, extra: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys, wandb\n{code}"],
        env=_environment(folder, extra),
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("*run-*/run-*.wandb"))


def _losses(path: Path) -> list[float]:
    return [item.values["loss"] for item in RunFile(path).stream() if isinstance(item, History)]


def test_an_offline_run_is_read_whole(tmp_path: Path) -> None:
    _run(tmp_path, LOG_FIVE, {"WANDB_MODE": "offline"})
    (path,) = _files(tmp_path)
    items = list(RunFile(path).stream())
    rows = [item for item in items if isinstance(item, History)]
    assert [row.step for row in rows] == list(range(5))
    assert [row.values["loss"] for row in rows] == pytest.approx([1 / (n + 1) for n in range(5)])
    assert abs(rows[-1].at - time.time()) < 300
    assert items[-1] == RunExit(0)


def test_an_online_run_is_read_from_its_file_as_the_server_got_it(tmp_path: Path, server: WandbServer) -> None:
    _run(tmp_path, LOG_FIVE, server.environment())
    (path,) = _files(tmp_path)
    (run,) = server.runs.values()
    assert _losses(path) == [row["loss"] for row in run.history]
    assert len(run.history) == 5
    assert (run.complete, run.exit_code, run.project) == (True, 0, "digits")


def test_a_key_in_a_netrc_file_is_enough_for_an_online_run(tmp_path: Path, server: WandbServer) -> None:
    _run(tmp_path, LOG_FIVE, server.netrc(tmp_path / "netrc"))
    (run,) = server.runs.values()
    assert len(run.history) == 5


def test_a_wrong_key_is_refused_by_the_server(tmp_path: Path, server: WandbServer) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        _run(tmp_path, LOG_FIVE, {**server.environment(), "WANDB_API_KEY": "w" * 40})
    assert server.runs == {}


def test_an_artifact_reaches_the_server(tmp_path: Path, server: WandbServer) -> None:
    code = (
        "open('model.bin', 'wb').write(b'weights')\nrun = wandb.init(project='digits')\n"
        "artifact = wandb.Artifact('model', 'model')\nartifact.add_file('model.bin')\n"
        "run.log_artifact(artifact)\nrun.finish()\n"
    )
    _run(tmp_path, code, server.environment())
    (artifact,) = [found for found in server.artifacts.values() if found.kind == "model"]
    assert artifact.committed
    assert artifact.files["model.bin"] == b"weights"


def test_two_attempts_of_one_online_run_are_one_curve(tmp_path: Path, server: WandbServer) -> None:
    same = {**server.environment(), "WANDB_RUN_ID": "k3f9", "WANDB_RESUME": "allow"}
    for n in (1, 2):
        _run(tmp_path / "jobs" / "digits" / f"attempt-{n}" / "wandb", LOG_FIVE, same)
    series = _loss_of_two_attempts(tmp_path)
    assert [step for step, _ in series] == list(range(10))
    assert [value for _, value in series] == [row["loss"] for row in server.runs["k3f9"].history]
    assert list(server.runs) == ["k3f9"]


def test_two_attempts_of_one_offline_run_are_drawn_as_a_sync_of_both_merges_them(
    tmp_path: Path, server: WandbServer
) -> None:
    same = {"WANDB_MODE": "offline", "WANDB_RUN_ID": "k3f9", "WANDB_RESUME": "allow"}
    folders = [tmp_path / "jobs" / "digits" / f"attempt-{n}" / "wandb" for n in (1, 2)]
    for folder in folders:
        _run(folder, LOG_FIVE, same)
    runs = [str(path.parent) for folder in folders for path in _files(folder)]
    wandb = [sys.executable, "-m", "wandb", "sync", "--yes", *runs]
    subprocess.run(wandb, env=_environment(tmp_path, server.environment()), cwd=tmp_path, check=True, timeout=120)
    synced = [(row["_step"], row["loss"]) for row in server.runs["k3f9"].history]
    assert _loss_of_two_attempts(tmp_path) == synced
    assert [step for step, _ in synced] == list(range(10))


def _loss_of_two_attempts(store: Path) -> list[tuple[float, float]]:
    (series,) = MetricsStore(store).page(job_view("digits", attempts=2), keys=["loss"]).series
    return [(point.step, point.value) for point in series.points]


def test_a_row_can_be_read_while_the_run_continues(tmp_path: Path) -> None:
    with _start(tmp_path, ONE_THEN_WAIT, {"WANDB_MODE": "offline", **FLUSH}) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "logged\n"
            (path,) = _files(tmp_path)
            losses = wait_until(lambda: _losses(path), 60, "the row is in the file")
            assert losses == [0.5]
            assert process.poll() is None
        finally:
            process.communicate("\n", timeout=60)


def test_what_was_flushed_before_a_sigkill_is_read(tmp_path: Path) -> None:
    with _start(tmp_path, ONE_THEN_WAIT, {"WANDB_MODE": "offline", **FLUSH}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        (path,) = _files(tmp_path)
        wait_until(lambda: _losses(path), 60, "the row is in the file")
        send_group(process.pid)
    reader = RunFile(path)
    items = list(reader.stream())
    assert [item.values for item in items if isinstance(item, History)] == [{"loss": 0.5}]
    assert reader.skipped == 0


def test_a_server_that_dies_takes_nothing_from_the_file(tmp_path: Path, server: WandbServer) -> None:
    code = (
        ONE_THEN_WAIT + "for n in range(4): run.log({'loss': 0.25})\nprint('more', flush=True)\nsys.stdin.readline()\n"
    )
    with _start(tmp_path, code, {**server.environment(), **FLUSH}) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        server.die()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "more\n"
        (path,) = _files(tmp_path)
        wait_until(lambda: len(_losses(path)) == 5, 60, "all rows are in the file")
        send_group(process.pid)


def test_reading_a_run_does_not_import_wandb(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom raylaunch.tracking.run_file import RunFile\n"
        "list(RunFile(Path(sys.argv[1])).stream())\nprint(sorted({'wandb', 'google.protobuf'} & set(sys.modules)))"
    )
    program = [sys.executable, "-c", code, str(tmp_path / "run-r1.wandb")]
    output = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout == "[]\n"
