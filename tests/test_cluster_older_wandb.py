"""Jobs whose own wandb is older than the cluster's: they work, and it is said that points show late."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.wandb_server import WandbServer

from raylaunch.models.states import JobState

pytestmark = [pytest.mark.ray, pytest.mark.wandb, pytest.mark.long]

VERSIONS = ("0.29", "0.30")  # the oldest that is supported, and what follows it
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
    assert "metrics appear late, and a kill may lose the last seconds" in cluster.good("show", job)
