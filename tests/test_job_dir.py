from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.attempts import attempt_spec
from support.waiting import wait_until

from raylaunch.agent import attempt_dir, job_dir
from raylaunch.agent.agent import sweep
from raylaunch.agent.attempt_files import disk_use
from raylaunch.agent.processes import started_ticks
from raylaunch.contract import FENCED, VAR_ATTEMPT
from raylaunch.errors import ConflictError, NotFoundError
from raylaunch.runner.processes import boot_id


def prepared(root: Path, package: Path | None = None, attempt: str = "digits-abc-1") -> job_dir.ReadyAttempt:
    secrets = {"KEY": "planted"}
    return job_dir.prepare(
        root, spec=attempt_spec(attempt), package=package, secrets=secrets, runner=b"zip", python="/a b/python"
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_no_other_user_may_read_what_is_prepared(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "train.py").write_text("print()")
    (package / "train.py").chmod(0o644)
    path = Path(prepared(tmp_path, package).folder)
    assert mode(path) == 0o700
    found = [each for each in (*path.rglob("*"), *(tmp_path / "jobs").rglob("*")) if not each.is_symlink()]
    assert {mode(each) for each in found if each.is_file()} == {0o600}
    assert {mode(each) for each in found if each.is_dir()} == {0o700}


def test_programs_stay_executable_and_links_stay_links(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "run.sh").write_text("#!/bin/sh\n")
    (package / "run.sh").chmod(0o755)
    (package / "link").symlink_to("run.sh")
    code = Path(prepared(tmp_path, package).folder) / "code"
    assert mode(code / "run.sh") == 0o700
    assert (code / "link").readlink() == Path("run.sh")


@pytest.mark.parametrize("tidied", [True, False])
def test_each_attempt_of_a_job_has_the_same_folder_of_checkpoints(*, tidied: bool, tmp_path: Path) -> None:
    first = Path(prepared(tmp_path).folder)
    (first / "checkpoints/run").mkdir()
    (first / "checkpoints/run/model.pt").write_text("weights")
    place = (first / "checkpoints").resolve()
    if tidied:
        job_dir.forget(tmp_path, "digits-abc-1", again=True)
        assert not first.exists()
    second = Path(prepared(tmp_path, attempt="digits-abc-2").folder)
    assert (second / "checkpoints").resolve() == place
    assert json.loads((second / "attempt.json").read_text())["job_dir"] == str(place.parent)
    assert (second / "checkpoints/run/model.pt").read_text() == "weights"
    job_dir.forget(tmp_path, "digits-abc-2")
    assert not list(tmp_path.rglob("model.pt"))


def test_an_attempt_that_0_1_0_made_and_did_not_start_writes_to_its_jobs_folder(tmp_path: Path) -> None:
    made = tmp_path / "attempts/digits-abc-1/checkpoints/run"
    made.mkdir(parents=True)
    checkpoints = Path(prepared(tmp_path).folder) / "checkpoints"
    assert checkpoints.resolve() == tmp_path.resolve() / "jobs/digits-abc/checkpoints"


def test_an_older_attempt_is_ended_before_a_newer_one_has_the_folder(tmp_path: Path) -> None:
    first = Path(prepared(tmp_path).folder)
    tag = attempt_spec("digits-abc-1")["tag"]
    training = subprocess.Popen(["sleep", "600"], env={**os.environ, VAR_ATTEMPT: tag}, start_new_session=True)
    prepared(tmp_path, attempt="digits-abc-2")
    assert training.wait(10) == -9
    assert json.loads((first / "claim.json").read_text())["epoch"] == FENCED
    assert not (first / "checkpoints").is_symlink()


def test_an_older_attempt_never_gets_the_folder_of_a_newer_one(tmp_path: Path) -> None:
    newer = Path(prepared(tmp_path, attempt="digits-abc-2").folder)
    with pytest.raises(ConflictError, match="attempt 2 of digits-abc"):
        prepared(tmp_path)
    job_dir.forget(tmp_path, "digits-abc-1")
    assert (newer / "checkpoints").is_dir()


def test_a_job_that_went_on_elsewhere_leaves_nothing_after_a_week(tmp_path: Path) -> None:
    prepared(tmp_path, attempt="other-abc-1")
    job_dir.forget(tmp_path, "other-abc-1", again=True)
    writer = tmp_path / "jobs/other-abc/writer.json"
    os.utime(writer, (time.time() - 8 * 86400,) * 2)
    prepared(tmp_path)
    assert not writer.parent.exists()


def test_a_job_that_runs_on_another_node_of_the_same_disk_keeps_its_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "lab.h2/node", tmp_path / "lab.h3/node"
    for root in (here, there):
        root.mkdir(parents=True)
        (tmp_path / "jobs").mkdir(exist_ok=True)
        (root / "jobs").symlink_to(tmp_path / "jobs")
    prepared(there, attempt="other-abc-1")
    writer = tmp_path / "jobs/other-abc/writer.json"
    os.utime(writer, (time.time() - 8 * 86400,) * 2)
    prepared(here)
    assert writer.exists()
    assert job_dir.job_folder(here, "other-abc-2") == job_dir.job_folder(there, "other-abc-2")


def test_a_job_that_changes_its_code_changes_only_its_own_copy(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "data.txt").write_text("one")
    (Path(prepared(tmp_path, package).folder) / "code/data.txt").write_text("two")
    assert (package / "data.txt").read_text() == "one"


def test_the_command_survives_a_shell(tmp_path: Path) -> None:
    ready = prepared(tmp_path)
    words = ["/a b/python", "-I", f"{ready.folder}/runner.pyz", ready.folder]
    assert shlex.split(ready.command) == words


def test_preparing_again_after_the_claim_changes_nothing(tmp_path: Path) -> None:
    path = Path(prepared(tmp_path).folder)
    (path / "secrets.json").unlink()
    claim = {"epoch": "epoch-1", "pid": 1, "started_ticks": 1, "boot_id": "b", "at": 1.0}
    (path / "claim.json").write_text(json.dumps(claim))
    prepared(tmp_path)
    assert not (path / "secrets.json").exists()


def test_a_fence_takes_the_claim_before_any_runner(tmp_path: Path) -> None:
    claim = attempt_dir.close(tmp_path, "digits-abc-1")
    assert claim["epoch"] == FENCED
    with pytest.raises(FileExistsError):
        os.open(tmp_path / "attempts/digits-abc-1/claim.json", os.O_CREAT | os.O_EXCL)
    with pytest.raises(ConflictError, match="stopped on this node"):
        prepared(tmp_path)


def test_a_fence_leaves_a_runners_claim_and_deletes_secrets(tmp_path: Path) -> None:
    path = Path(prepared(tmp_path).folder)
    claim = {"epoch": "epoch-1", "pid": 0, "started_ticks": 1, "boot_id": "b", "at": 1.0}
    (path / "claim.json").write_text(json.dumps(claim))
    assert attempt_dir.close(tmp_path, "digits-abc-1") == claim
    assert not (path / "secrets.json").exists()


@pytest.mark.parametrize("name", ["../digits-1", "a/b-1", "", "digits", ".hidden-1", "digits-1\n"])
def test_a_name_that_is_no_attempts_id_reaches_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFoundError):
        attempt_dir.attempt_folder(tmp_path, name)


def test_forgetting_twice_is_forgetting_once(tmp_path: Path) -> None:
    path = Path(prepared(tmp_path).folder)
    job_dir.forget(tmp_path, "digits-abc-1")
    job_dir.forget(tmp_path, "digits-abc-1")
    assert not path.exists()


def test_training_dies_with_its_runner(tmp_path: Path) -> None:
    path = Path(prepared(tmp_path).folder)
    spec = attempt_spec("digits-abc-1")
    training = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env={**os.environ, VAR_ATTEMPT: spec["tag"]},
        start_new_session=True,
    )
    claim = {"epoch": "epoch-1", "pid": training.pid, "started_ticks": 1, "boot_id": "b", "at": 1.0}
    (path / "claim.json").write_text(json.dumps(claim))
    swept: set[str] = set()
    wait_until(lambda: sweep(tmp_path, swept) or training.poll() is not None, 60, "the sweep found it")
    assert training.wait(10) == -9


def test_training_of_a_living_runner_is_left_alone(tmp_path: Path) -> None:
    path = Path(prepared(tmp_path).folder)
    claim = {
        "epoch": "epoch-1",
        "pid": os.getpid(),
        "started_ticks": started_ticks(os.getpid()),
        "boot_id": boot_id(),
        "at": 1.0,
    }
    (path / "claim.json").write_text(json.dumps(claim))
    assert sweep(tmp_path, set()) == []


def test_the_disk_use_of_a_node_counts_environments_code_and_attempts_each_file_once(tmp_path: Path) -> None:
    for name, size in {
        "envs/pip-1/lib.py": 100,
        "packages/a.tar.gz": 10,
        "attempts/j-1/log": 3,
        "jobs/j/out": 2,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "envs" / "again.py").hardlink_to(tmp_path / "envs/pip-1/lib.py")
    assert disk_use(tmp_path) == {"environments": 100, "packages": 10, "attempts": 5}
    assert disk_use(tmp_path / "nothing") == {"environments": 0, "packages": 0, "attempts": 0}
