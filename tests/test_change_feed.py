from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from pathlib import Path

import pytest
from support.attempts import attempt_spec

from raylaunch.agent.attempt_files import inventory
from raylaunch.agent.change_feed import BUDGET, ChangeFeed, ChangeReply
from raylaunch.agent.job_dir import ReadyAttempt, forget, prepare
from raylaunch.controller.ray.protocol import Stored
from raylaunch.controller.ray.replica import GapError, ReplicaStore

ATTEMPT = "digits-abc-1"


class World:
    """One node and one store, without Ray between them."""

    def __init__(self, folder: Path) -> None:
        self.root, self.store = folder / "node", folder / "store"
        ready = prepare(
            self.root, spec=attempt_spec(ATTEMPT), package=None, secrets={"K": "planted"}, runner=b"", python="python"
        )
        self.node = Path(ready.folder)
        self.kept = self.store / "jobs/digits-abc/attempt-1"
        self.kept.parent.mkdir(parents=True)
        self.restart()

    def restart(self, attempt: str = ATTEMPT) -> None:
        """Begin anew on both sides, as after a crash of the bridge and the node agent."""
        self.changes, self.mirror = ChangeFeed(self.root), ReplicaStore(self.store)
        self.answer = self.changes.take("session", self.mirror.have([attempt]))

    def carry(self) -> int:
        """Carry until nothing changes; return how many bytes went over."""
        carried = 0
        while self.answer["chunks"]:
            carried += self.write(self.answer)
            self.answer = self.changes.take("session", None)
        self.mirror.save(at_once=True)
        self.answer = self.changes.take("session", None)
        return carried + (self.carry() if self.answer["chunks"] else 0)

    def write(self, answer: ChangeReply) -> int:
        for chunk in answer["chunks"]:
            self.mirror.write(chunk)
        return sum(len(chunk.data) for chunk in answer["chunks"])

    def carry_as(self, session: str) -> None:
        """Carry what there is now, in another session."""
        for _ in range(3):
            self.write(self.answer)
            self.answer = self.changes.take(session, None)

    def next_attempt(self, attempt: str, folder: Path) -> None:
        """Go on with another attempt of the job, which is prepared."""
        self.node = folder
        self.restart(attempt)

    def end(self) -> None:
        """Let the attempt be over."""
        self.carry()
        (self.node / "exit.json").write_text(json.dumps({"ended": "completed"}))
        self.answer = self.changes.take("session", None)
        self.changes.check_again(ATTEMPT)

    def output(self, path: str, data: bytes, *, age_s: float = 10) -> Path:
        """Write an output that has been at rest for a while."""
        where = self.node / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(data)
        os.utime(where, (time.time() - age_s, time.time() - age_s))
        return where


def prepare_next(world: World) -> ReadyAttempt:
    forget(world.root, ATTEMPT, again=True)
    spec = attempt_spec("digits-abc-2")
    return prepare(world.root, spec=spec, package=None, secrets={}, runner=b"", python="python")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def log(world: World, data: bytes, rank: int = 0) -> None:
    with (world.node / f"logs/rank-{rank}.log").open("ab") as file:
        file.write(data)


def test_a_log_arrives_byte_for_byte_however_it_is_cut(world: World) -> None:
    log(world, b"\xff\xfe not utf-8\r")
    world.carry()
    log(world, b"x" * (BUDGET + 12345))
    world.carry()
    assert (world.kept / "logs/rank-0.log").read_bytes() == (world.node / "logs/rank-0.log").read_bytes()


def test_one_answer_is_bounded(world: World) -> None:
    world.carry()
    log(world, b"x" * (3 * BUDGET))
    answer = world.changes.take("session", None)
    assert 0 < sum(len(chunk.data) for chunk in answer["chunks"]) <= BUDGET


def test_secrets_and_heartbeats_stay_on_the_node(world: World) -> None:
    (world.node / "heartbeat").touch()
    (world.node / "tmp/scratch").write_text("x")
    (world.node / "code/train.py").write_text("x")
    world.carry()
    world.end()
    world.carry()
    found = {str(path.relative_to(world.kept)) for path in world.kept.rglob("*") if path.is_file()}
    assert found == {"attempt.json", "exit.json", ".replicated.json"}


def test_after_a_restart_nothing_is_sent_again(world: World) -> None:
    log(world, b"line\n" * 1000)
    world.output("outputs/model.bin", b"m" * 5_000_000)
    world.restart()
    assert world.carry() > 5_000_000
    world.restart()
    assert world.carry() == 0
    log(world, b"more\n")
    world.restart()
    assert world.carry() == 5


def test_a_half_written_piece_is_repaired_after_a_crash(world: World) -> None:
    log(world, b"0123456789" * 100)
    world.carry()
    os.truncate(world.kept / "logs/rank-0.log", 345)
    world.restart()
    world.carry()
    assert (world.kept / "logs/rank-0.log").read_bytes() == b"0123456789" * 100


def test_an_answer_that_was_lost_is_noticed_and_sent_again(world: World) -> None:
    world.carry()
    log(world, b"lost")
    world.changes.take("session", None)
    log(world, b"found")
    with pytest.raises(GapError):
        world.write(world.changes.take("session", None))
    world.restart()
    world.carry()
    assert (world.kept / "logs/rank-0.log").read_bytes() == b"lostfound"


def test_a_restarted_agent_requests_a_full_sync(world: World) -> None:
    assert ChangeFeed(world.root).take("session", None)["resync"]


def test_an_output_is_sent_when_it_is_unchanged_or_the_attempt_has_ended(world: World) -> None:
    world.output("outputs/resting.bin", b"done")
    world.output("outputs/growing.bin", b"half", age_s=0)
    world.restart()
    world.carry()
    assert (world.kept / "outputs/resting.bin").exists()
    assert not (world.kept / "outputs/growing.bin").exists()
    world.end()
    world.carry()
    assert (world.kept / "outputs/growing.bin").read_bytes() == b"half"


def test_an_output_that_changes_is_replaced_as_a_whole(world: World) -> None:
    world.output("checkpoints/last.ckpt", b"first", age_s=100)
    world.restart()
    world.carry()
    world.output("checkpoints/last.ckpt", b"second", age_s=50)
    world.restart()
    world.carry()
    assert (world.kept / "checkpoints/last.ckpt").read_bytes() == b"second"


def test_a_file_that_changes_while_it_is_sent_never_arrives_mixed(world: World) -> None:
    world.output("outputs/big.bin", b"a" * (2 * BUDGET), age_s=100)
    world.restart()
    world.write(world.answer)
    world.output("outputs/big.bin", b"b" * (2 * BUDGET), age_s=50)
    world.answer = world.changes.take("session", None)
    world.carry()
    assert not (world.kept / "outputs/big.bin").exists()
    world.restart()
    world.carry()
    assert (world.kept / "outputs/big.bin").read_bytes() == b"b" * (2 * BUDGET)


def test_a_truncated_log_is_sent_again(world: World) -> None:
    log(world, b"a long first life\n")
    world.carry()
    (world.node / "logs/rank-0.log").write_bytes(b"second\n")
    world.answer = world.changes.take("session", None)
    world.carry()
    log(world, b"and on\n")
    world.answer = world.changes.take("session", None)
    world.carry()
    assert (world.kept / "logs/rank-0.log").read_bytes() == b"second\nand on\n"


def test_the_wandb_file_is_sent_as_it_grows_and_its_other_files_at_the_end(world: World) -> None:
    run = "wandb/wandb/offline-run-1-abc"
    world.output(f"{run}/run-abc.wandb", b":W&B")
    world.output(f"{run}/files/config.yaml", b"lr: 1")
    world.output(f"{run}/logs/debug.log", b"noise")
    world.output("wandb/data/artifacts/staging/tmp1", b"a model")
    world.restart()
    world.carry()
    assert (world.kept / run / "run-abc.wandb").read_bytes() == b":W&B"
    assert not (world.kept / run / "files").exists()
    assert not (world.kept / "wandb/data").exists()
    world.end()
    world.carry()
    assert (world.kept / run / "files/config.yaml").read_bytes() == b"lr: 1"
    assert not (world.kept / run / "logs").exists()
    assert (world.kept / "wandb/data/artifacts/staging/tmp1").read_bytes() == b"a model"


def test_files_that_grow_with_each_step_are_checked_on_request_and_at_the_end(world: World) -> None:
    run, reports = "wandb/wandb/offline-run-1-abc/run-abc.wandb", "progress.jsonl"
    world.output(run, b":W&B")
    world.output(reports, b"{}")
    log(world, b"line\n")
    world.restart()
    assert {chunk.path for chunk in world.answer["chunks"]} >= {run, reports, "logs/rank-0.log"}
    world.output(run, b":W&B and more")
    log(world, b"another\n")
    answer = world.changes.take("session", None, metrics=False)
    assert [chunk.path for chunk in answer["chunks"]] == ["logs/rank-0.log"]
    (world.node / "exit.json").write_text(json.dumps({"ended": "completed"}))
    world.changes.take("session", None, metrics=False)
    answer = world.changes.take("session", None, metrics=False)
    assert run in {chunk.path for chunk in answer["chunks"]}


def test_a_link_out_of_the_folder_is_not_followed(world: World, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").write_text("planted")
    (world.node / "outputs/key").symlink_to(tmp_path / "private/key")
    (world.node / "outputs/all").symlink_to(tmp_path / "private")
    (world.node / "logs/rank-0.log").symlink_to(tmp_path / "private/key")
    world.end()
    world.carry()
    assert not [path for path in world.store.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]


def test_links_that_stay_inside_are_kept_relative(world: World) -> None:
    model = world.output("checkpoints/step-3/model.pt", b"weights")
    (world.node / "checkpoints/last.pt").symlink_to(model)
    (world.node / "checkpoints/latest").symlink_to(model.parent.resolve(), target_is_directory=True)
    (world.node / "checkpoints/step-3/up").symlink_to("../latest/../last.pt")
    (world.node / "outputs/best").symlink_to("../checkpoints/latest")
    world.end()
    world.carry()
    assert (world.kept / "checkpoints/last.pt").readlink() == Path("step-3/model.pt")
    assert (world.kept / "checkpoints/latest").readlink() == Path("step-3")
    assert (world.kept / "checkpoints/step-3/up").readlink() == Path("../last.pt")
    assert (world.kept / "outputs/best/model.pt").read_bytes() == b"weights"
    assert inventory(world.node, checksums=True, known={})["checkpoints/latest"] == (6, "link:step-3")


def test_a_link_replaces_a_folder_and_a_folder_a_link(world: World) -> None:
    world.output("checkpoints/latest/model.pt", b"one")
    (world.node / "checkpoints/best").symlink_to("latest")
    world.carry()
    (world.node / "checkpoints/latest").rename(world.node / "checkpoints/step-1")
    (world.node / "checkpoints/latest").symlink_to("step-1")
    (world.node / "checkpoints/best").unlink()
    world.output("checkpoints/best/model.pt", b"best")
    world.end()
    world.carry()
    assert (world.kept / "checkpoints/latest").readlink() == Path("step-1")
    assert (world.kept / "checkpoints/best/model.pt").read_bytes() == b"best"
    assert (world.kept / "checkpoints/step-1/model.pt").read_bytes() == b"one"


@pytest.mark.parametrize("target", ["/etc", "../..", "../../claim.json", "a/../../../x", ""])
def test_a_link_that_leads_out_is_not_written(world: World, target: str) -> None:
    chunk = world.answer["chunks"][0]._replace(mode="link", path="checkpoints/x", sha256=f"link:{target}")
    with pytest.raises(ValueError, match="leads out"):
        world.mirror.write(chunk)


def test_files_unchanged_in_the_next_attempt_are_stored_once(world: World) -> None:
    world.output("checkpoints/old.pt", b"o" * 1000)
    world.output("checkpoints/last.pt", b"one")
    world.output("checkpoints/deleted.pt", b"d")
    world.end()
    world.carry()
    world.node = folder = Path(prepare_next(world).folder)
    world.output("checkpoints/last.pt", b"two!")
    (folder / "checkpoints/deleted.pt").unlink()
    world.next_attempt("digits-abc-2", folder)
    carried = world.carry()
    first, second = world.store / "jobs/digits-abc/attempt-1", world.store / "jobs/digits-abc/attempt-2"
    assert carried < 1000
    assert (first / "checkpoints/old.pt").samefile(second / "checkpoints/old.pt")
    assert (first / "checkpoints/last.pt").read_bytes() == b"one"
    assert (second / "checkpoints/last.pt").read_bytes() == b"two!"
    assert not (second / "checkpoints/deleted.pt").exists()


def test_an_attempt_that_starts_within_a_session_sends_nothing_twice(world: World) -> None:
    world.output("checkpoints/old.pt", b"o" * 1000)
    world.end()
    world.carry()
    world.changes.expect("digits-abc-2", world.mirror.have(["digits-abc-2"])["digits-abc-2"])
    prepare_next(world)
    world.answer = world.changes.take("session", None)
    assert world.carry() < 1000
    first, second = world.store / "jobs/digits-abc/attempt-1", world.store / "jobs/digits-abc/attempt-2"
    assert (first / "checkpoints/old.pt").samefile(second / "checkpoints/old.pt")


def test_a_file_that_only_looks_unchanged_is_sent_again(world: World) -> None:
    model = world.output("checkpoints/last.pt", b"one")
    world.end()
    world.carry()
    times = (model.stat().st_atime_ns, model.stat().st_mtime_ns)
    folder = Path(prepare_next(world).folder)
    model = folder / "checkpoints/last.pt"
    model.write_bytes(b"two")
    os.utime(model, ns=times)
    world.next_attempt("digits-abc-2", folder)
    world.carry()
    checksums = {path: sha256 for path, (_, sha256) in inventory(folder, checksums=True, known={}).items()}
    assert world.mirror.differing("digits-abc-2", checksums) == ["checkpoints/last.pt"]
    world.mirror.drop("digits-abc-2", ["checkpoints/last.pt"])
    world.answer = world.changes.take("again", world.mirror.have(["digits-abc-2"]))
    world.carry_as("again")
    second = world.store / "jobs/digits-abc/attempt-2"
    assert (second / "checkpoints/last.pt").read_bytes() == b"two"
    assert (world.store / "jobs/digits-abc/attempt-1/checkpoints/last.pt").read_bytes() == b"one"


def test_a_piece_that_names_a_path_outside_is_refused(world: World) -> None:
    chunk = world.answer["chunks"][0]
    for path in ("../escaped", "/etc/escaped", "outputs/../../escaped", ""):
        with pytest.raises(ValueError, match="is not a path"):
            world.mirror.write(chunk._replace(path=path))


def test_a_link_planted_in_the_store_is_not_written_through(world: World, tmp_path: Path) -> None:
    world.kept.mkdir()
    (world.kept / "logs").symlink_to(tmp_path)
    log(world, b"line")
    world.answer = world.changes.take("session", {})
    with pytest.raises(ValueError, match="is a link"):
        world.carry()


def test_files_of_a_removed_job_on_a_node_are_not_replicated_again(world: World) -> None:
    world.kept.parent.rmdir()
    world.carry()
    assert not world.kept.exists()


def test_a_wrong_checksum_is_detected_and_repaired(world: World) -> None:
    log(world, b"good")
    world.end()
    world.carry()
    (world.kept / "logs/rank-0.log").write_bytes(b"evil")
    found = inventory(world.node, checksums=True, known={})
    checksums = {path: sha256 for path, (_, sha256) in found.items()}
    assert world.mirror.missing(ATTEMPT, {path: size for path, (size, _) in found.items()}) == []
    assert world.mirror.differing(ATTEMPT, checksums) == ["logs/rank-0.log"]
    world.mirror.drop(ATTEMPT, ["logs/rank-0.log"])
    world.restart()
    world.carry()
    assert world.mirror.differing(ATTEMPT, checksums) == []


def test_finalizing_reports_the_checksums_of_growing_files(world: World) -> None:
    log(world, b"good")
    world.end()
    world.carry()
    found = inventory(world.node, checksums=True, known={})
    events = world.mirror.finalize(ATTEMPT, {path: sha256 for path, (_, sha256) in found.items()})
    sha256 = hashlib.sha256(b"good").hexdigest()
    assert events == [Stored(attempt=ATTEMPT, path="logs/rank-0.log", size=4, sha256=sha256)]


def test_a_vanished_file_is_not_an_error(world: World) -> None:
    path = world.output("outputs/a.bin", b"a" * (2 * BUDGET))
    world.restart()
    path.unlink()
    world.carry()
    assert not (world.kept / "outputs/a.bin").exists()


def test_facts_are_sent_once_and_again_when_they_change(world: World) -> None:
    assert [facts["attempt"] for facts in world.answer["attempts"]] == [ATTEMPT]
    assert world.changes.take("session", None)["attempts"] == []
    (world.node / "exit.json").write_text('{"ended": "comp')
    assert world.changes.take("session", None)["attempts"] == []
    (world.node / "exit.json").write_text('{"ended": "completed"}')
    facts = world.changes.take("session", None)["attempts"]
    assert [found["exit"] for found in facts] == [{"ended": "completed"}]


def test_a_write_that_fails_halfway_leaves_the_file_as_it_was(world: World) -> None:
    """A limit on file sizes stands for a disk that fills up in the middle of a piece."""
    log(world, b"0123456789")
    world.carry()
    log(world, b"x" * 100_000)
    answer = world.changes.take("session", None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            world.write(answer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (world.kept / "logs/rank-0.log").read_bytes() == b"0123456789"
    world.write(answer)
    assert (world.kept / "logs/rank-0.log").stat().st_size == 100_010
