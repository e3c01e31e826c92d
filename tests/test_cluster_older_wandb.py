"""Jobs whose own wandb is older than the cluster's: its points may be late, and none is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.waiting import wait_until
from support.wandb_server import WandbServer

from raylaunch.state import JobState

pytestmark = [pytest.mark.ray, pytest.mark.wandb, pytest.mark.long]

VERSIONS = ("0.29", "0.30")  # the oldest that is supported, and what follows it
KEEPS_COUNT = """
import os, time, wandb
run = wandb.init()
for step in range(100_000):
    run.log({"pt": step})
    with open(os.environ["COUNT"], "w") as count:
        count.write(str(step))
    time.sleep(0.02)
"""
LOGS_FIVE = "import wandb\nrun = wandb.init()\nfor step in range(5): run.log({'pt': step})\n"
INSTALLED_S = 240.0


def submit(cluster: Cluster, version: str, code: str, folder: Path, **env: str) -> str:
    """Submit a job that runs `code` with this minor version of wandb."""
    own = {name: value for name, value in env.items() if not name.startswith("WANDB_")}
    spec = {
        "entrypoint": ["python", "-c", code],
        "environment": {"pip": [f"wandb=={version}.*"]},
        "working_dir": "",
        "env": own,
    }
    (folder / "job.yaml").write_text(json.dumps(spec))
    return cluster.submit("-f", "job.yaml", cwd=folder, env=env)


def steps(cluster: Cluster, job: str) -> list[int]:
    """Return the steps whose points can be read."""
    page = cluster.ask(lambda client: client.metrics(job, keys=["pt"], max_points=100_000))
    return [int(point.value) for series in page.series for point in series.points]


@pytest.mark.parametrize("version", VERSIONS)
def test_no_point_is_lost_by_a_sigkill_with_wandb(version: str, cluster: Cluster, tmp_path: Path) -> None:
    count = tmp_path / "count"
    job = submit(cluster, version, KEEPS_COUNT, tmp_path, COUNT=str(count))
    wait_until(lambda: count.exists() and int(count.read_text() or 0) > 20, INSTALLED_S, "the training logs")
    os.kill(cluster.runs(job).attempts[0].pid or 0, signal.SIGKILL)
    ended = cluster.ended(job)
    assert ended.state is JobState.FAILED
    assert max(steps(cluster, job)) >= int(count.read_text())
    assert "writes its file in blocks: metrics may show late; 0.31 or newer writes at once" in cluster.good("show", job)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_on_line_run_is_whole_at_the_server_with_wandb(version: str, cluster: Cluster, tmp_path: Path) -> None:
    with WandbServer() as server:
        job = submit(cluster, version, LOGS_FIVE, tmp_path, **server.environment())
        done = cluster.ended(job, INSTALLED_S)
        assert done.state is JobState.SUCCEEDED
        assert done.wandb is not None
        run = server.runs[done.wandb.run_id]
        assert done.wandb.url == f"{server.url}/team/raylaunch/runs/{run.id}"
        assert [row["pt"] for row in run.history] == list(range(5))
        assert run.complete
    assert steps(cluster, job) == list(range(5))
