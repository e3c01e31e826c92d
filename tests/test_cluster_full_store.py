"""The disk of the store of a real cluster is full: that is said, and nothing is lost."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support.cluster import running_cluster
from support.disasters import TALKS
from support.disks import fill, small_disk
from support.waiting import wait_until

from raylaunch.cluster.processes import of_controller, of_ray
from raylaunch.models.states import JobState

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.mark.long
def test_a_full_store_is_reported_and_files_wait_on_their_node_and_down_stops_all(tmp_path: Path) -> None:
    with small_disk(tmp_path / "store", kib=16 * 1024) as store, running_cluster({"store": str(store)}) as full:
        enough = tmp_path / "enough"
        code = TALKS + "print('y' * 3_000_000)\n"
        words = ("--tracking", "disabled", "--env", f"ENOUGH={enough}", "--env", f"LEDGER={tmp_path / 'ledger'}")
        running = full.python(code, *words, "--gpus", "4")
        full.runs(running)
        waiting = full.python("print('after all')", "--gpus", "1", "--tracking", "disabled")
        ballast = fill(store)
        refused = full.cli("submit", "--working-dir", "", "--", "python", "-c", "print(1)")
        assert refused.status == 1
        assert re.search(rf"cannot write {store}/jobs/python-\w+.*: No space left on device", refused.err)
        hint = "nothing was recorded; free space on that disk (raylaunch du shows the usage of jobs), then try again"
        assert hint in refused.err
        enough.touch()
        problem = f"{running}-1: the store cannot be written: the disk of {os.uname().nodename} is full"
        wait_until(lambda: problem in full.good("status"), 60, "the problem is said")
        assert not full.job(running).state.ended
        ballast.unlink()
        done = full.ended(running, 90)
        assert done.state is JobState.SUCCEEDED
        lines = full.log(running).splitlines()
        assert lines.pop() == b"y" * 3_000_000
        assert lines == [b"%d %s" % (n, b"x" * 200) for n in range(len(lines))]
        assert full.ended(waiting).state is JobState.SUCCEEDED
        last = full.python("import time; time.sleep(600)", "--tracking", "disabled")
        full.runs(last)
        refusal = full.cli("down")
        assert refusal.status == 1
        assert last in refusal.err
        record = full.record()
        full.good("down", "--force")
        assert of_controller(record.cluster_id) == []
        assert of_ray(record.cluster_id, record.ray, full.paths.temp) == []
        assert full.of_attempt(f"{last}-1") == []
