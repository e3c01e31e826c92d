"""What several threads or processes use at once: the trash, a replica's state, the pipe of the bridge's process."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raylaunch.controller.ray.protocol import BridgeDown, pack
from raylaunch.controller.ray.replica import ReplicaStore
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.packages import PackageStore
from raylaunch.controller.store.recovery import TRASH, empty_trash, move_to_trash
from raylaunch.errors import NotFoundError, SpecError
from raylaunch.models.job import SubmitRequest
from raylaunch.models.job_spec import JobSpec


def test_a_job_may_go_into_the_trash_while_it_is_emptied(tmp_path: Path) -> None:
    jobs = [tmp_path / "jobs" / f"job-{number}" for number in range(300)]
    for job in jobs:
        (job / "attempt-1").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        emptying = [pool.submit(empty_trash, tmp_path) for _ in range(300)]
        for job in jobs:
            move_to_trash(tmp_path, job.name)
        for one in emptying:
            one.result(60)
    empty_trash(tmp_path)
    assert list((tmp_path / TRASH).iterdir()) == []
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_mirror_forgets_while_it_compares(tmp_path: Path) -> None:
    mirror = ReplicaStore(tmp_path)
    attempts = [f"job-{number}-1" for number in range(400)]
    for attempt in attempts:
        folder = mirror.folder(attempt) / "logs"
        folder.mkdir(parents=True)
        (folder / "rank-0.log").write_text("one line\n")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            comparing = pool.submit(
                lambda: [mirror.differing(attempt, {"logs/rank-0.log": "none"}) for attempt in attempts]
            )
            while not comparing.done():
                mirror.forget("job-0-1")
            assert comparing.result() == [["logs/rank-0.log"]] * len(attempts)
    finally:
        sys.setswitchinterval(before)


def test_the_bridges_process_is_not_held_up_by_a_controller_that_does_not_read() -> None:
    program = (
        "import sys\n"
        "from raylaunch.controller.ray.protocol import Stdout\n"
        "out = Stdout()\n"
        "for _ in range(8): out.send('x' * 1024 * 1024)\n"
        "sys.stderr.write('goes on\\n')\n"
        "sys.stderr.flush()\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert child.stderr is not None
        assert child.stderr.readline() == b"goes on\n"
    finally:
        child.kill()
        child.communicate(timeout=10)


def test_last_words_of_the_bridges_process_arrive() -> None:
    program = (
        "from raylaunch.controller.ray.protocol import Stdout\n"
        "out = Stdout()\n"
        "for n in range(100): out.send(n)\n"
        "out.fail('the end')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == b"".join(map(pack, [*range(100), BridgeDown(why="the end")]))


def test_what_is_looked_up_by_id_is_never_found_by_its_name(tmp_path: Path) -> None:
    records = Records(tmp_path)
    try:
        job, _ = records.create(SubmitRequest(spec=JobSpec(entrypoint="true", name="digits")), owner="ana", wandb=None)
        assert records.by_id(job.id) == job
        for ref in ("digits", "last"):
            assert records.get(ref, owner="ana").id == job.id
            with pytest.raises(NotFoundError):
                records.by_id(ref)
    finally:
        records.close()


def test_names_of_packages_that_cannot_be_leave_no_locks_behind(tmp_path: Path) -> None:
    store = PackageStore(tmp_path)
    for number in range(100):
        with pytest.raises(SpecError, match="is not a sha256"):
            store.put(f"../{number}", offset=0, total=1, data=b"x")
        store.put(f"{number:064x}", offset=0, total=2, data=b"x")
    assert len(store._busy) == 0  # noqa: SLF001 -- that memory does not grow shows nowhere else
