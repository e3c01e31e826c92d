"""What a job's attempt before has left is there for the next one: on the same node, on another, and on the way back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.attempts import attempt_spec
from support.running import Attempt

from raylaunch.agent import job_dir
from raylaunch.agent.attempt_files import inventory
from raylaunch.agent.change_feed import ChangeFeed
from raylaunch.agent.job_dir import forget, prepare
from raylaunch.controller.ray.handover import bring
from raylaunch.controller.ray.protocol import BridgeEvent, Stored
from raylaunch.controller.ray.replica import ReplicaStore
from raylaunch.controller.ray.replication import Replication
from raylaunch.errors import ClusterError, ConflictError, NotFoundError, TransferError
from raylaunch.runner import command, outputs

JOB = "digits-abc"


class Node:
    """A node, and how the controller reaches it."""

    def __init__(self, root: Path, store: Path) -> None:
        self.root, self.store = root, store
        self.pieces = 0

    async def __call__(self, method: str, *args: object, timeout_s: float, **named: object) -> object:
        """Call what the node agent's method of this name does."""
        del timeout_s
        self.pieces += method == "bring"
        function = {"job_has": "last_writer"}.get(method, method)
        return getattr(job_dir, function)(self.root, *args, **named)

    def start(self, n: int) -> Path:
        """Begin attempt `n` here, as the controller does; returns the folder of checkpoints."""
        spec = attempt_spec(f"{JOB}-{n}")
        moved_from = asyncio.run(bring(self, self.store, spec["attempt"], spec["tag"]))
        ready = prepare(
            self.root,
            spec={**spec, "moved_from": moved_from},
            package=None,
            secrets={},
            runner=b"",
            python="python",
        )
        claim = {"epoch": "e", "pid": 0, "started_ticks": 0, "boot_id": "", "at": 0.0}
        Path(ready.folder, "claim.json").write_text(json.dumps(claim))
        return Path(ready.folder, "checkpoints").resolve()

    def carry(self, n: int, *, over: bool = True) -> None:
        """Bring what attempt `n` has written to the store."""
        attempt = f"{JOB}-{n}"
        folder = self.root / "attempts" / attempt
        if over:
            (folder / "exit.json").write_text("{}")
        changes, mirror = ChangeFeed(self.root), ReplicaStore(self.store)
        answer = changes.take("s", mirror.have([attempt]))
        for _ in range(4):
            for chunk in answer["chunks"]:
                mirror.write(chunk)
            changes.check_again(attempt)
            answer = changes.take("s", None)
        mirror.save(at_once=True)
        if over:
            mirror.finalize(
                attempt, {path: sha for path, (_, sha) in inventory(folder, checksums=True, known={}).items()}
            )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store/jobs" / JOB).mkdir(parents=True)
    return tmp_path / "store"


def tree(folder: Path) -> dict[str, str]:
    """Return what is in a folder: texts of files, targets of links."""
    return {
        str(path.relative_to(folder)): f"-> {path.readlink()}" if path.is_symlink() else path.read_text()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_on_another_node_a_job_resumes_with_the_files_in_the_store(tmp_path: Path, store: Path) -> None:
    here, there = Node(tmp_path / "a", store), Node(tmp_path / "b", store)
    first = here.start(1)
    (first / "step-1").mkdir()
    (first / "step-1/model.pt").write_text("one")
    (first / "last").symlink_to("step-1")
    (first / "rotated.pt").write_text("r")
    here.carry(1, over=False)
    (first / "rotated.pt").unlink()
    here.carry(1)
    second = there.start(2)
    assert tree(second) == {"step-1/model.pt": "one", "last": "-> step-1"}
    spec = json.loads((there.root / f"attempts/{JOB}-2/attempt.json").read_text())
    assert (spec["moved_from"], spec["job_dir"]) == (str(first.parent), str(second.parent))
    assert "same root" in command.moved(spec)[0]


def test_on_the_way_back_older_copies_are_replaced_and_equal_files_are_not_sent(tmp_path: Path, store: Path) -> None:
    here, there = Node(tmp_path / "a", store), Node(tmp_path / "b", store)
    first = here.start(1)
    for name in ("kept.pt", "changed.pt", "deleted.pt"):
        (first / name).write_text(name)
    (first / "link").symlink_to("deleted.pt")
    here.carry(1)
    second = there.start(2)
    (second / "changed.pt").write_text("newer")
    (second / "deleted.pt").unlink()
    (second / "link").unlink()
    (second / "link").symlink_to("kept.pt")
    there.carry(2)
    (first / "late.pt").write_text("by the first attempt, when its node was out of reach")
    (first / "out").symlink_to("/etc")
    third = here.start(3)
    assert third == first
    assert tree(third) == {"kept.pt": "kept.pt", "changed.pt": "newer", "link": "-> kept.pt"}
    assert here.pieces == 1
    assert (store / f"jobs/{JOB}/attempt-1/checkpoints/kept.pt").samefile(
        store / f"jobs/{JOB}/attempt-2/checkpoints/kept.pt"
    )


def test_collected_outputs_are_replaced_on_another_node_too(tmp_path: Path, store: Path) -> None:
    here, there = Node(tmp_path / "a", store), Node(tmp_path / "b", store)

    def collected(node: Node, n: int) -> Path:
        job = node.start(n).parent
        folder = node.root / "attempts" / f"{JOB}-{n}"
        (folder / "code").mkdir(exist_ok=True)
        (folder / "code/model.pt").write_text(f"of attempt {n}")
        outputs.collect(folder / "code", job, ["auto"], outputs.OutputLimits(100, 100), {})
        (folder / "collected.json").write_bytes((job / "collected.json").read_bytes())
        node.carry(n)
        return job

    collected(here, 1)
    assert (collected(there, 2) / "outputs/model.pt").read_text() == "of attempt 2"
    third = here.start(3).parent
    assert json.loads((third / "collected.json").read_text()) == ["model.pt"]
    assert (third / "outputs/model.pt").read_text() == "of attempt 2"


def test_on_the_same_node_files_not_yet_in_the_store_are_kept(tmp_path: Path, store: Path) -> None:
    here = Node(tmp_path / "a", store)
    first = here.start(1)
    here.carry(1, over=False)
    (first / "not-sent-yet.pt").write_text("newest")
    assert tree(here.start(2)) == {"not-sent-yet.pt": "newest"}
    assert here.pieces == 0


def test_an_attempt_that_never_ran_changes_nothing(tmp_path: Path, store: Path) -> None:
    here, there = Node(tmp_path / "a", store), Node(tmp_path / "b", store)
    (here.start(1) / "model.pt").write_text("one")
    here.carry(1)
    assert tree(there.start(3)) == {"model.pt": "one"}


def test_bringing_that_was_interrupted_is_finished_before_the_next_attempt(tmp_path: Path, store: Path) -> None:
    here, there = Node(tmp_path / "a", store), Node(tmp_path / "b", store)
    first = here.start(1)
    for name in ("one.pt", "two.pt"):
        (first / name).write_text(name)
    here.carry(1)
    (store / f"jobs/{JOB}/attempt-1/checkpoints/two.pt").rename(tmp_path / "aside")
    (store / f"jobs/{JOB}/attempt-1/checkpoints/two.pt").write_text("TWO.pt")
    with pytest.raises(TransferError, match="damaged"):
        there.start(2)
    (tmp_path / "aside").replace(store / f"jobs/{JOB}/attempt-1/checkpoints/two.pt")
    assert tree(there.start(2)) == {"one.pt": "one.pt", "two.pt": "two.pt"}


def test_a_piece_for_an_older_attempt_is_refused(tmp_path: Path, store: Path) -> None:
    here = Node(tmp_path / "a", store)
    here.start(2)
    with pytest.raises(ConflictError, match="attempt 2"):
        job_dir.begin_bringing(here.root, f"{JOB}-1", "cluster/x", {})


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Attempt]:
    """A first attempt that runs on another machine, which has the same node root."""
    attempt = Attempt(tmp_path / "node", "echo on > begun; exec sleep 600")
    attempt.start()
    attempt.started_pid()
    path = attempt.folder / "claim.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": "of another machine"}))
    (attempt.folder.parent / "job-aaaaaa-2").mkdir()
    yield attempt
    attempt.close()


@pytest.mark.slow
def test_an_attempt_on_another_machine_with_the_same_root_ends_before_the_next_starts(elsewhere: Attempt) -> None:
    root = elsewhere.folder.parent.parent
    folder = job_dir.take(root, "job-aaaaaa-2", "another tag, as on another machine/job-aaaaaa-2")
    assert (elsewhere.exit(0)["ended"], elsewhere.processes()) == ("stopped", [])
    assert json.loads((folder / "writer.json").read_text()) == {"n": 2, "root": str(root)}


@pytest.mark.slow
def test_an_attempt_of_another_node_on_the_same_disk_ends_before_the_next_starts(elsewhere: Attempt) -> None:
    root = elsewhere.folder.parent.parent
    (elsewhere.folder.parent / "job-aaaaaa-2").rmdir()
    folder = job_dir.take(root, "job-aaaaaa-1", "tag/job-aaaaaa-1")
    other = root.with_name("other")
    (other / "attempts/job-aaaaaa-2").mkdir(parents=True)
    (other / "jobs").symlink_to(root / "jobs")
    assert job_dir.take(other, "job-aaaaaa-2", "another tag/job-aaaaaa-2") == folder
    assert (elsewhere.exit(0)["ended"], elsewhere.processes()) == ("stopped", [])


@pytest.mark.slow
def test_an_attempt_that_does_not_end_on_another_machine_keeps_the_next_from_starting(elsewhere: Attempt) -> None:
    root = elsewhere.folder.parent.parent
    assert elsewhere.runner
    elsewhere.runner.send_signal(signal.SIGSTOP)
    os.utime(elsewhere.folder / "heartbeat")
    with pytest.raises(ClusterError, match="another machine"):
        job_dir.take(root, "job-aaaaaa-2", "another/job-aaaaaa-2", other_machine_s=0.5)
    assert job_dir.last_writer(root, "job-aaaaaa-2") == 0
    os.utime(elsewhere.folder / "heartbeat", (time.time() - 60,) * 2)
    job_dir.take(root, "job-aaaaaa-2", "another/job-aaaaaa-2", other_machine_s=0.5)
    elsewhere.runner.send_signal(signal.SIGCONT)
    assert elsewhere.exit()["ended"] == "stopped", "it is ended as soon as it can be"


@pytest.mark.parametrize("path", ["../x", "code/x", "checkpoints/../../x", "checkpoints/out/new/x", "checkpoints//x"])
def test_no_piece_is_written_outside_the_jobs_folder(tmp_path: Path, path: str) -> None:
    folder = job_dir.job_folder(tmp_path, f"{JOB}-2")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="job's folder"):
        job_dir.bring(tmp_path, f"{JOB}-2", path, 0, b"", None)
    assert not (tmp_path / "new").exists()


def test_an_output_that_was_not_kept_is_brought_until_a_week_has_passed(tmp_path: Path, store: Path) -> None:
    here = Node(tmp_path / "a", store)
    left = here.start(1).parent / "left"
    left.mkdir()
    (left / "big.bin").write_text("large")
    (left / "out").symlink_to("/etc")
    forget(here.root, f"{JOB}-1")
    seen: list[BridgeEvent] = []
    replication = Replication("n", call=here, replica=ReplicaStore(store), emit=seen.append)
    asyncio.run(replication.bring_left(f"{JOB}-1", "big.bin"))
    assert (store / f"jobs/{JOB}/attempt-1/outputs/big.bin").read_text() == "large"
    assert [event.path for event in seen if isinstance(event, Stored)] == ["outputs/big.bin"]
    asyncio.run(replication.bring_left(f"{JOB}-1", "big.bin", below="withheld"))
    assert (store / f"jobs/{JOB}/attempt-1/withheld/big.bin").read_text() == "large"
    for path in ("../writer.json", "out/passwd", "gone"):
        with pytest.raises(NotFoundError, match="no longer"):
            asyncio.run(replication.bring_left(f"{JOB}-1", path))
    os.utime(left.parent / "writer.json", (time.time() - 8 * 86400,) * 2)
    forget(here.root, "other-abc-1")
    assert not left.exists()
