"""The runs that programs open with plain ``wandb.init``: each its own, found wherever it is written. wandb is real."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.running import Attempt
from support.waiting import wait_until
from support.wandb_server import WandbServer

from raylaunch import contract
from raylaunch.tracking.run_file import History, RunFile, exit_code, run_files, run_info

pytestmark = [
    pytest.mark.wandb,
    pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the wandb package"),
]

Make = Callable[..., Attempt]
K_FOLD = """
import wandb
for fold in (1, 2):
    run = wandb.init(name=f"fold-{fold}", reinit=True)
    run.log({"loss": fold})
assert wandb.init() is run
run.finish()
one, two = (wandb.init(reinit="create_new") for _ in range(2))
one.log({"loss": 3})
two.log({"loss": 4})
one.finish()
two.finish()
wandb.init(id="mine").log({"loss": 5})
"""
ELSEWHERE = """
import os, pathlib, sys, wandb
os.makedirs("logs")
with wandb.init(dir="logs") as run:
    run.log({"loss": 1})
with wandb.init(settings=wandb.Settings(root_dir=sys.argv[1])) as run:
    run.log({"loss": 2})
    pathlib.Path("note.txt").write_text("a note")
    run.save("note.txt", policy="now")
"""
LOGS_ELSEWHERE = """
import sys, time, wandb
run = wandb.init(dir=sys.argv[1])
for step in range(100_000):
    run.log({"pt": step})
    time.sleep(0.02)
"""


LOGS_AN_ARTIFACT = """
import wandb
run = wandb.init()
artifact = wandb.Artifact("m", "model")
artifact.add_file("train.py")
run.log_artifact(artifact)
"""
FOLDS = """
import sys, wandb
for fold in sys.argv[1:]:
    with wandb.init(name=fold) as run:
        run.log({"pt": 1})
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make attempts that run train.py, and end what they left."""
    made: list[Attempt] = []

    def one(program: str, entrypoint: str | list[str] = "python train.py", **changes: object) -> Attempt:
        made.append(Attempt(tmp_path / str(len(made)), entrypoint, **changes))
        made[-1].file("train.py", program)
        return made[-1]

    yield one
    for attempt in made:
        attempt.close()


def rows(attempt: Attempt) -> dict[str, list[float]]:
    """Return what each run of the attempt has logged, by run id, as the attempt's own folder has it."""
    found: dict[str, list[float]] = {}
    for path in run_files(attempt.folder):
        items = [item for item in RunFile(path).stream() if isinstance(item, History)]
        found.setdefault(path.stem[4:], []).extend(value for row in items for value in row.values.values())
    return found


def test_each_init_is_a_run_of_its_own_as_with_bare_wandb(make: Make) -> None:
    attempt = make(K_FOLD)
    assert attempt.run()["ended"] == "completed", attempt.log.read_text()
    assert rows(attempt) == {"run1": [1], "run1-1-2": [2], "run1-1-3": [3], "run1-1-4": [4], "mine": [5]}
    assert sorted(attempt.facts()["wandb_runs"]) == ["mine", "run1", "run1-1-2", "run1-1-3", "run1-1-4"]
    assert attempt.facts()["wandb_run"] == "run1"
    names = {path.stem[4:]: info.name for path in run_files(attempt.folder) if (info := run_info(path))}
    assert names == {"run1": "fold-1", "run1-1-2": "fold-2", "run1-1-3": "job", "run1-1-4": "job-2", "mine": "job"}
    assert "wandb sync" not in attempt.log.read_text()


@pytest.mark.long
def test_each_init_is_a_run_of_its_own_online_too(make: Make) -> None:
    with WandbServer() as server:
        attempt = make(K_FOLD, env=server.environment())
        assert attempt.run()["ended"] == "completed", attempt.log.read_text()
        found = {run.id: [row["loss"] for row in run.history] for run in server.runs.values()}
        names = {run.id: run.fields["displayName"] for run in server.runs.values()}
        groups = {run.fields["groupName"] for run in server.runs.values()}
    assert found == rows(attempt) == {"run1": [1], "run1-1-2": [2], "run1-1-3": [3], "run1-1-4": [4], "mine": [5]}
    assert (names["run1-1-3"], names["run1-1-4"], groups) == ("job", "job-2", {"job"})
    assert attempt.facts()["wandb_url"].endswith("/runs/run1")


def test_two_programs_of_a_job_are_two_runs(make: Make) -> None:
    once = "import wandb\nwandb.init().log({'loss': 1})\n"
    attempt = make(once, "python train.py && python train.py")
    assert attempt.run()["ended"] == "completed", attempt.log.read_text()
    assert rows(attempt) == {"run1": [1], "run1-1-2": [1]}


def test_runs_are_kept_wherever_the_program_has_them_written(make: Make, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    brought = "until ls ../wandb/wandb/*/run-run1-1-2.wandb 2>/dev/null; do sleep 0.1; done"
    removed = f"rm -r {tmp_path}/far logs/wandb/latest-run"
    attempt = make(ELSEWHERE, f"python train.py {tmp_path}/far && {brought} && {removed}")
    assert attempt.run()["ended"] == "completed", attempt.log.read_text()
    assert rows(attempt) == {"run1": [1], "run1-1-2": [2]}
    assert [exit_code(path) for path in run_files(attempt.folder)] == [0, 0]
    first, _ = run_files(attempt.folder)
    assert (first.parent / "files/requirements.txt").exists()


@pytest.mark.long
def test_a_run_that_was_written_elsewhere_can_be_synced_from_the_attempts_folder(make: Make, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    attempt = make(ELSEWHERE, f"python train.py {tmp_path}/far")
    attempt.run()
    shutil.rmtree(tmp_path / "far")
    shutil.rmtree(attempt.code / "logs")
    folders = [str(path.parent) for path in run_files(attempt.folder)]
    with WandbServer() as server:
        sync = [sys.executable, "-m", "wandb", "sync", "--yes", *folders]
        env = {**os.environ, **server.environment(), "HOME": str(tmp_path)}
        subprocess.run(sync, env=env, cwd=tmp_path, check=True, timeout=120)
        found = {run.id: [row["loss"] for row in run.history] for run in server.runs.values()}
    assert found == {"run1": [1], "run1-1-2": [2]}


@pytest.mark.long  # test_cluster_tracking has it too
def test_files_that_an_offline_artifact_has_staged_are_kept_and_counted(make: Make) -> None:
    attempt = make(LOGS_AN_ARTIFACT)
    attempt.run()
    staged = [path for path in (attempt.folder / contract.WANDB_DATA).rglob("*") if path.is_file()]
    assert (attempt.code / "train.py").read_bytes() in [path.read_bytes() for path in staged]
    assert attempt.facts()["wandb_staged"] == sum(path.stat().st_size for path in staged)


def test_a_run_elsewhere_can_be_read_while_it_grows(make: Make, tmp_path: Path) -> None:
    attempt = make(LOGS_ELSEWHERE, f"python train.py {tmp_path}")
    attempt.start()
    wait_until(lambda: len(rows(attempt).get("run1", [])) > 20, 60, "rows of a run elsewhere")
    wait_until(lambda: attempt.facts().get("wandb_runs") == ["run1"], 60, "the runner has told which runs there are")
    attempt.stop(grace_s=1.0)


def test_a_run_without_a_hook_is_found_by_the_files_that_wandb_holds_open(make: Make, tmp_path: Path) -> None:
    attempt = make(LOGS_ELSEWHERE, f"python -I train.py {tmp_path}")
    attempt.start()
    wait_until(lambda: any(len(found) > 20 for found in rows(attempt).values()), 60, "rows of a run elsewhere")
    wait_until(lambda: attempt.facts().get("wandb_runs"), 60, "the runner has told which runs there are")
    assert attempt.facts()["wandb_run"] == next(iter(rows(attempt)))
    attempt.stop(grace_s=1.0)


def test_a_retry_continues_what_was_not_finished_and_opens_nothing_finished_again(make: Make) -> None:
    with WandbServer() as server:
        first = make(FOLDS + "        assert fold != 'b'\n", "python train.py a b", env=server.environment())
        assert first.run()["ended"] == "exit_code"
        earlier = [
            {
                "attempt": 1,
                "id": info.run_id,
                "project": info.project,
                "name": info.name,
                "finished": not exit_code(path),
            }
            for path in run_files(first.folder)
            if (info := run_info(path))
        ]
        assert [(run["id"], run["finished"]) for run in earlier] == [("run1", True), ("run1-1-2", False)]
        reported = json.loads((first.folder / contract.ATTEMPT).read_text())["wandb"]
        second = make(
            FOLDS, "python train.py a b", env=server.environment(), n=2, wandb={**reported, "earlier": earlier}
        )
        assert second.run()["ended"] == "completed", second.log.read_text()
        found = {run.id: [row["_step"] for row in run.history] for run in server.runs.values()}
    assert found == {"run1": [0], "run1-1-2": [0, 1], "run1-2-1": [0]}


@pytest.mark.long
def test_an_init_that_fails_takes_no_run_from_the_next(make: Make) -> None:
    program = (
        "import wandb\ntry: wandb.init(resume='allow', config=3)\nexcept Exception: pass\nwandb.init().log({'pt': 1})"
    )
    attempt = make(program)
    attempt.run()
    assert rows(attempt) == {"run1": [1]}
