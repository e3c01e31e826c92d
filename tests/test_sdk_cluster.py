"""The SDK on a real cluster: the page about it as it stands, and kernels that die."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.cluster import Cluster, argv, unstarted_cluster
from support.waiting import wait_until

from raylaunch.models.states import JobState

pytestmark = pytest.mark.ray

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
TRAINING = "import time\nprint('ready', flush=True)\ntime.sleep(600)"
SUBMIT = f"""
import raylaunch
cluster = raylaunch.connect(start=False)
job = cluster.submit(["python", "-c", {TRAINING!r}], name="orphan", working_dir="", request_id=REQUEST, grace_s=1)
print(job.id, flush=True)
"""


def python(cluster: Cluster, script: str) -> subprocess.Popen[str]:
    """Start a Python whose home is the cluster's."""
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=cluster.work, env=cluster.env, stdout=subprocess.PIPE, text=True
    )


def test_the_page_about_python_runs_as_it_stands(cluster: Cluster, tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "42"
    assert "failed 7 ()" in done.stdout


@pytest.mark.parametrize("doing", ["job.wait()", "for line in job.follow_logs(): print(line, flush=True)"])
def test_a_killed_kernel_leaves_its_job_running_and_the_same_request_id_finds_it(cluster: Cluster, doing: str) -> None:
    submit = SUBMIT.replace("REQUEST", repr(doing))
    with python(cluster, submit + doing) as kernel:
        assert kernel.stdout is not None
        job = kernel.stdout.readline().strip()
        running = cluster.runs(job)
        if "follow" in doing:
            assert kernel.stdout.readline() == "ready\n"
        kernel.kill()
        kernel.communicate(timeout=30)
    with python(cluster, submit) as again:
        out, _ = again.communicate(timeout=60)
    assert out.strip() == job
    after = cluster.job(job)
    assert (after.state, after.attempts) == (JobState.RUNNING, running.attempts)
    wait_until(lambda: b"ready" in cluster.log(job), 30, "its log goes on")
    cluster.good("stop", job)
    cluster.ended(job)


START = """
import raylaunch
with raylaunch.connect(start=True) as cluster:
    job = cluster.submit("echo trained", name="first", working_dir="", request_id="first")
    print(job.id, job.wait(timeout_s=120).state.value, flush=True)
"""


def test_connecting_starts_a_cluster_from_nothing_and_a_kernel_killed_meanwhile_is_made_good_by_the_next() -> None:
    with unstarted_cluster() as nothing:
        with python(nothing, START) as first:
            wait_until(lambda: ray_began(nothing) or first.poll() is not None, 60, "Ray is being started")
            first.kill()
            first.communicate(timeout=30)
        with python(nothing, START) as second:
            out, _ = second.communicate(timeout=240)
        assert second.returncode == 0
        job, state = out.split()
        assert state == "succeeded"
        with python(nothing, START) as third:
            out, _ = third.communicate(timeout=120)
        assert out.split() == [job, "succeeded"]
        heads = [one for one in nothing.processes() if "raylaunch.cluster.ray_start" in argv(one)]
        assert [head.pid for head in heads] == [nothing.ray_pid()]


def ray_began(cluster: Cluster) -> bool:
    return cluster.paths.record.exists() and cluster.record().ray is not None
