"""Which id each W&B run of a job gets, over processes and attempts."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.run_writer import ended, history, run, write_run

from raylaunch import contract
from raylaunch.contract import EarlierRun
from raylaunch.tracking import wandb_runs
from raylaunch.tracking.run_file import earlier_runs
from raylaunch.tracking.wandb_runs import Run, RunRequest, claim

PROJECT = "digits"


def claims(folder: Path, *earlier: EarlierRun, n: int = 1, name: str = "job") -> str:
    """Make the folder of an attempt's claims; `name` is the one that runs get where a program gives none."""
    folder.mkdir()
    reported = {"n": n, "id": "rl1", "name": name, "earlier": earlier}
    (folder / wandb_runs.ATTEMPT).write_text(json.dumps(reported))
    return str(folder)


def was(run_id: str, name: str = "job", *, finished: bool = False, attempt: int = 1) -> EarlierRun:
    return {"attempt": attempt, "id": run_id, "project": PROJECT, "name": name, "finished": finished}


def opened(folder: str, *names: str, base: str = "rl1") -> list[Run]:
    """Open runs of these names one after the other."""
    return [claim(folder, RunRequest(base, PROJECT, name)) for name in names]


def ids(runs: list[Run]) -> list[str]:
    return [run.id for run in runs]


def test_the_variables_are_those_of_the_contract() -> None:
    assert (wandb_runs.FOLDER, wandb_runs.BASE) == (contract.VAR_WANDB_RUNS, contract.VAR_WANDB_RUN)


def test_the_first_run_is_the_jobs_and_each_further_one_its_own(tmp_path: Path) -> None:
    assert opened(claims(tmp_path / "runs"), "fold-1", "fold-2") == [
        Run("rl1", "fold-1", resume=True),
        Run("rl1-1-2", "fold-2", resume=False),
    ]


def test_runs_that_the_program_does_not_name_are_numbered(tmp_path: Path) -> None:
    assert [run.name for run in opened(claims(tmp_path / "runs"), "job", "job", "mine", "job")] == [
        "job",
        "job-2",
        "mine",
        "job-3",
    ]


def test_a_name_that_the_person_sets_for_all_runs_is_left(tmp_path: Path) -> None:
    assert [run.name for run in opened(claims(tmp_path / "runs", name=""), "all", "all")] == ["all", "all"]


def test_processes_that_open_runs_at_once_get_different_ones(tmp_path: Path) -> None:
    folder = claims(tmp_path / "runs")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: claim(folder, RunRequest("rl1", PROJECT, "job")).id, range(40)))
    assert sorted(found) == sorted(["rl1", *(f"rl1-1-{n}" for n in range(2, 41))])


def test_each_rank_has_a_run_of_its_own_whichever_comes_first(tmp_path: Path) -> None:
    folder = claims(tmp_path / "runs")
    (first,) = opened(folder, "job-rank-1", base="rl1-rank-1")
    (second,) = opened(folder, "job", base="rl1")
    (third,) = opened(folder, "job", base="rl1-rank-2")
    assert [first, second, third] == [
        Run("rl1-rank-1", "job-rank-1", resume=True),
        Run("rl1", "job", resume=True),
        Run("rl1-rank-2", "job-rank-2", resume=True),
    ]


def test_a_retry_continues_the_run_that_was_not_finished(tmp_path: Path) -> None:
    folder = claims(tmp_path / "runs", was("rl1"), n=2)
    assert opened(folder, "job") == [Run("rl1", "job", resume=True)]


def test_a_retry_opens_no_finished_run_again(tmp_path: Path) -> None:
    folder = claims(tmp_path / "runs", was("rl1", "fold-1", finished=True), was("rl1-1-2", "fold-2"), n=2)
    assert opened(folder, "fold-1", "fold-2", "fold-3") == [
        Run("rl1-2-1", "fold-1", resume=False),
        Run("rl1-1-2", "fold-2", resume=True),
        Run("rl1-2-3", "fold-3", resume=False),
    ]


def test_a_retry_that_skips_finished_parts_continues_by_name(tmp_path: Path) -> None:
    folder = claims(tmp_path / "runs", was("rl1", "fold-1", finished=True), was("rl1-1-2", "fold-2"), n=2)
    assert ids(opened(folder, "fold-2")) == ["rl1-1-2"]


def test_runs_of_one_name_are_matched_by_their_order(tmp_path: Path) -> None:
    names = was("rl1", "fold", finished=True), was("rl1-1-2", "fold")
    folder = claims(tmp_path / "runs", *names, n=2)
    assert ids(opened(folder, "fold", "fold")) == ["rl1-2-1", "rl1-1-2"]


def test_unnamed_runs_are_matched_by_their_order(tmp_path: Path) -> None:
    before = was("rl1", "job", finished=True), was("rl1-1-2", "job-2")
    folder = claims(tmp_path / "runs", *before, n=2)
    assert ids(opened(folder, "job", "job")) == ["rl1-2-1", "rl1-1-2"]


def test_the_latest_attempt_that_came_so_far_counts(tmp_path: Path) -> None:
    before = (
        was("rl1", "fold-1", finished=True),
        was("rl1-1-2", "fold-2"),
        was("rl1-2-1", "fold-1", attempt=2),
    )
    folder = claims(tmp_path / "runs", *before, n=3)
    assert ids(opened(folder, "fold-1", "fold-2")) == ["rl1-2-1", "rl1-1-2"]


def test_a_run_of_another_project_is_another_run(tmp_path: Path) -> None:
    folder = claims(tmp_path / "runs", was("rl1"), n=2)
    assert claim(folder, RunRequest("rl1", "another", "job")) == Run("rl1-2-1", "job", resume=False)


def test_a_rank_continues_its_own_run_also_where_all_have_one_name(tmp_path: Path) -> None:
    folder = claims(tmp_path / "runs", was("rl1-rank-1", "x"), was("rl1", "x"), n=2)
    assert ids(opened(folder, "x") + opened(folder, "x", base="rl1-rank-1")) == ["rl1", "rl1-rank-1"]


def test_a_training_that_is_started_again_within_the_attempt_continues_its_runs(tmp_path: Path) -> None:
    folder = claims(tmp_path / "runs")
    opened(folder, "job", "fold")
    again = [claim(folder, RunRequest("rl1", PROJECT, name, round="1")) for name in ("job", "fold", "new")]
    assert [(run.id, run.resume) for run in again] == [("rl1", True), ("rl1-1-2", True), ("rl1-1-5", False)]


def test_what_must_be_a_new_run_is_one(tmp_path: Path) -> None:
    folder = claims(tmp_path / "runs", was("rl1"), n=2)
    assert claim(folder, RunRequest("rl1", PROJECT, "job", may_resume=False)) == Run("rl1-2-1", "job", resume=False)


def test_the_next_attempt_knows_the_earlier_runs_and_whether_they_are_finished(
    tmp_path: Path,
) -> None:
    ends = {"a": [ended(0)], "b": [ended(1)], "c": []}
    for second, (name, end) in enumerate(ends.items()):
        records = [run(name), *(history(step, {"loss": 1.0}) for step in range(3000)), *end]
        write_run(tmp_path / "attempt-1", records, run_id=name, started=f"20260101_12000{second}")
    write_run(tmp_path / "attempt-2", [run("d"), ended(0)], run_id="d")
    write_run(tmp_path / "attempt-3", [run("e")], run_id="e")
    (tmp_path / "attempt-2/wandb/wandb/run-20260101_130000-x").mkdir()
    (tmp_path / "attempt-2/wandb/wandb/run-20260101_130000-x/run-x.wandb").write_bytes(b"not a run")
    found = earlier_runs(tmp_path, 3)
    assert [(one["attempt"], one["id"], one["finished"]) for one in found] == [
        (1, "a", True),
        (1, "b", False),
        (1, "c", False),
        (2, "d", True),
    ]
    assert (found[0]["project"], found[0]["name"]) == ("digits", "brave-net")
