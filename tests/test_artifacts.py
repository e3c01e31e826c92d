"""The files that jobs leave behind: listed, summed, and never from outside the job's folder."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from raylaunch.controller.store.artifacts import Artifacts, Left
from raylaunch.errors import NotFoundError
from raylaunch.models.states import JobState

JOB = "digits-abcdef"


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    (tmp_path / "jobs" / JOB).mkdir(parents=True)
    return Artifacts(tmp_path)


def put(tmp_path: Path, path: str, content: bytes = b"content") -> Path:
    file = tmp_path / "jobs" / JOB / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_files_are_listed_with_kind_attempt_and_size(tmp_path: Path, artifacts: Artifacts) -> None:
    for path in (
        "spec.yaml",
        "attempt-1/exit.json",
        "attempt-1/logs/rank-0.log",
        "attempt-2/outputs/deep/model.pt",
        "attempt-2/checkpoints/1/w",
        "attempt-2/wandb/wandb/run-1/run-1.wandb",
    ):
        put(tmp_path, path)
    assert [(file.path, file.kind, file.attempt, file.bytes) for file in artifacts.files(JOB)] == [
        ("spec.yaml", "record", 0, 7),
        ("attempt-1/exit.json", "record", 1, 7),
        ("attempt-1/logs/rank-0.log", "log", 1, 7),
        ("attempt-2/checkpoints/1/w", "checkpoint", 2, 7),
        ("attempt-2/outputs/deep/model.pt", "output", 2, 7),
        ("attempt-2/wandb/wandb/run-1/run-1.wandb", "wandb", 2, 7),
    ]
    assert artifacts.outputs(JOB) == (1, 7)


def test_unfinished_files_and_links_that_lead_outside_are_not_listed(tmp_path: Path, artifacts: Artifacts) -> None:
    put(tmp_path, "attempt-1/outputs/.model.pt.raylaunch-part")
    put(tmp_path, "attempt-1/.replicated.json")
    (tmp_path / "jobs" / JOB / "attempt-1" / "outputs" / "link").symlink_to("/etc/passwd")
    assert artifacts.files(JOB) == ()


def test_a_link_to_a_file_is_listed_as_the_file_and_one_to_a_folder_as_a_link(
    tmp_path: Path, artifacts: Artifacts
) -> None:
    put(tmp_path, "attempt-1/checkpoints/step-3/model.pt", b"weights")
    checkpoints = tmp_path / "jobs" / JOB / "attempt-1" / "checkpoints"
    (checkpoints / "last.pt").symlink_to("step-3/model.pt")
    (checkpoints / "latest").symlink_to("step-3")
    artifacts.note(JOB, "attempt-1/checkpoints/step-3/model.pt", size=7, sha256="abc")
    assert [(file.path, file.bytes, file.sha256, file.link) for file in artifacts.files(JOB)] == [
        ("attempt-1/checkpoints/last.pt", 7, "abc", ""),
        ("attempt-1/checkpoints/latest", 0, "", "step-3"),
        ("attempt-1/checkpoints/step-3/model.pt", 7, "abc", ""),
    ]
    assert artifacts.path(JOB, "attempt-1/checkpoints/latest/model.pt")[0].read_bytes() == b"weights"
    assert "attempt-1/checkpoints/latest" not in artifacts.finalize(JOB).files


def test_files_shared_by_two_attempts_count_once(tmp_path: Path, artifacts: Artifacts) -> None:
    put(tmp_path, "attempt-1/outputs/model.pt", b"weights")
    put(tmp_path, "attempt-2/outputs/new.pt", b"new")
    folder = tmp_path / "jobs" / JOB
    (folder / "attempt-2/outputs/model.pt").hardlink_to(folder / "attempt-1/outputs/model.pt")
    assert artifacts.outputs(JOB) == (2, 10)
    assert artifacts.bytes_of(JOB) == 10
    assert artifacts.usage(JOB, name="digits", state=JobState.SUCCEEDED).outputs == 10


def test_files_that_were_not_kept_are_listed_as_left_and_are_not_outputs(tmp_path: Path, artifacts: Artifacts) -> None:
    put(tmp_path, "attempt-1/facts.json", b'{"left": {"gone.bin": 1}}')
    put(tmp_path, "attempt-2/facts.json", b'{"left": {"big.bin": 5000, "kept.pt": 7}}')
    put(tmp_path, "attempt-2/outputs/kept.pt")
    left = [(file.path, file.bytes, file.attempt) for file in artifacts.files(JOB) if file.left]
    assert left == [("attempt-2/outputs/big.bin", 5000, 2)]
    assert artifacts.outputs(JOB) == (1, 7)
    facts = tmp_path / "jobs" / JOB / "attempt-2/facts.json"
    os.utime(facts, (time.time() - 8 * 86400,) * 2)
    assert artifacts.left(JOB) == Left(2)


def test_suspected_secrets_are_listed_as_withheld_and_hidden_once_fetched(tmp_path: Path, artifacts: Artifacts) -> None:
    put(tmp_path, "attempt-1/facts.json", b'{"left": {".env": 5, "big.bin": 9}, "withheld": [".env"]}')
    put(tmp_path, "attempt-1/withheld/.env", b"TOKEN")
    found = [(file.path, file.withheld) for file in artifacts.files(JOB) if file.left]
    assert found == [("attempt-1/outputs/.env", True), ("attempt-1/outputs/big.bin", False)]
    assert [file.path for file in artifacts.files(JOB) if not file.left] == ["attempt-1/facts.json"]
    assert "attempt-1/withheld/.env" not in artifacts.finalize(JOB).files
    for path in ("attempt-1/withheld/.env", "withheld/.env", ".env"):
        with pytest.raises(NotFoundError):
            artifacts.path(JOB, path)
    where, artifact = artifacts.withheld(JOB, ".env")
    assert (where.read_bytes(), artifact.sha256) == (b"TOKEN", sha256(b"TOKEN"))


def test_a_noted_checksum_is_shown_as_long_as_the_file_is_the_same(tmp_path: Path, artifacts: Artifacts) -> None:
    path = "attempt-1/outputs/model.pt"
    file = put(tmp_path, path, b"one")
    artifacts.note(JOB, path, size=3, sha256=sha256(b"one"))
    assert artifacts.files(JOB)[0].sha256 == sha256(b"one")
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert artifacts.files(JOB)[0].sha256 == ""


def test_a_checksum_of_another_size_is_not_believed(tmp_path: Path, artifacts: Artifacts) -> None:
    put(tmp_path, "attempt-1/outputs/model.pt", b"one")
    artifacts.note(JOB, "attempt-1/outputs/model.pt", size=2, sha256="0" * 64)
    artifacts.note(JOB, "attempt-1/outputs/gone", size=2, sha256="0" * 64)
    assert [file.sha256 for file in artifacts.files(JOB)] == [""]


def test_the_manifest_holds_size_and_checksum_of_every_file(tmp_path: Path, artifacts: Artifacts) -> None:
    put(tmp_path, "journal.jsonl")
    put(tmp_path, "attempt-1/outputs/größe.pt", b"model")
    put(tmp_path, "attempt-1/logs/rank-0.log", b"log")
    artifacts.finalize(JOB)
    written = json.loads((tmp_path / "jobs" / JOB / "manifest.json").read_text())["files"]
    assert {path: (entry["bytes"], entry["sha256"]) for path, entry in written.items()} == {
        "attempt-1/outputs/größe.pt": (5, sha256(b"model")),
        "attempt-1/logs/rank-0.log": (3, sha256(b"log")),
    }
    shown = {file.path: file.sha256 for file in Artifacts(tmp_path).files(JOB)}
    assert shown["attempt-1/outputs/größe.pt"] == sha256(b"model")
    assert shown["manifest.json"] == ""


def test_a_damaged_manifest_is_recreated(tmp_path: Path, artifacts: Artifacts) -> None:
    put(tmp_path, "attempt-1/outputs/m", b"model")
    put(tmp_path, "manifest.json", b"{")
    assert {file.path: file.sha256 for file in artifacts.files(JOB)}["attempt-1/outputs/m"] == ""
    artifacts.finalize(JOB)
    assert {file.path: file.sha256 for file in artifacts.files(JOB)}["attempt-1/outputs/m"] == sha256(b"model")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("attempt-1/outputs/model.pt", "attempt-1/outputs/model.pt"),
        ("model.pt", "attempt-10/outputs/model.pt"),
        ("outputs/model.pt", "attempt-10/outputs/model.pt"),
        ("only-in-1", "attempt-1/outputs/only-in-1"),
        ("logs/rank-0.log", "attempt-1/logs/rank-0.log"),
    ],
)
def test_a_short_path_means_the_latest_attempt_that_has_it(
    tmp_path: Path, artifacts: Artifacts, asked: str, found: str
) -> None:
    for path in ("attempt-1/outputs/model.pt", "attempt-10/outputs/model.pt", "attempt-2/outputs/model.pt"):
        put(tmp_path, path)
    put(tmp_path, "attempt-1/outputs/only-in-1")
    put(tmp_path, "attempt-1/logs/rank-0.log")
    where, artifact = artifacts.path(JOB, asked)
    assert where == (tmp_path / "jobs" / JOB / found).resolve()
    assert artifact.path == found


@pytest.mark.parametrize(
    "path",
    [
        "../other/secret",
        "attempt-1/../../other/secret",
        "/etc/passwd",
        "link",
        "folder-link/secret",
        "a\0b",
        "",
        ".",
        "none",
    ],
)
def test_no_path_leads_out_of_the_jobs_folder(tmp_path: Path, artifacts: Artifacts, path: str) -> None:
    other = tmp_path / "jobs" / "other"
    other.mkdir()
    (other / "secret").write_text("secret")
    outputs = tmp_path / "jobs" / JOB / "attempt-1" / "outputs"
    outputs.mkdir(parents=True)
    (outputs / "link").symlink_to(other / "secret")
    (outputs / "folder-link").symlink_to(other)
    with pytest.raises(NotFoundError) as raised:
        artifacts.path(JOB, path)
    assert str(raised.value) == f"{JOB} has no file {path!r}\n  → see its files: raylaunch files {JOB}"


def test_a_job_folder_that_is_itself_a_link_is_served(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "f").write_text("x")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / JOB).symlink_to(tmp_path / "shared")
    assert Artifacts(tmp_path).path(JOB, "f")[0] == (tmp_path / "shared" / "f").resolve()


def test_usage_is_summed_by_kind_of_file(tmp_path: Path, artifacts: Artifacts) -> None:
    put(tmp_path, "spec.yaml", b"1")
    put(tmp_path, "attempt-1/logs/rank-0.log", b"22")
    put(tmp_path, "attempt-1/outputs/m", b"333")
    put(tmp_path, "attempt-1/checkpoints/c", b"4444")
    put(tmp_path, "attempt-2/wandb/w", b"55555")
    usage = artifacts.usage(JOB, name="digits", state=JobState.FAILED)
    assert (usage.bytes, usage.logs, usage.outputs, usage.checkpoints, usage.wandb) == (15, 2, 3, 4, 5)
    assert artifacts.bytes_of(JOB) == 15


def test_an_output_that_two_attempts_wrote_counts_once_as_the_latest(tmp_path: Path, artifacts: Artifacts) -> None:
    put(tmp_path, "attempt-1/outputs/model.pt", b"first")
    put(tmp_path, "attempt-2/outputs/model.pt", b"second")
    put(tmp_path, "attempt-1/outputs/early.pt", b"only")
    assert artifacts.outputs(JOB) == (2, len(b"second") + len(b"only"))
