"""Secrets that the cluster's file names: they reach every attempt, by name."""

from __future__ import annotations

from pathlib import Path

from raylaunch.cluster.local.controller_process import write_config
from raylaunch.cluster.record import new_record
from raylaunch.controller.scheduler.attempt_context import attempt_spec
from raylaunch.controller.settings import Settings
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.job_spec import JobSpec
from raylaunch.paths import cluster_paths, make_cluster_dirs


def test_every_job_gets_the_clusters_secrets_in_addition_to_its_own(tmp_path: Path) -> None:
    paths = cluster_paths("local", {"RAYLAUNCH_HOME": str(tmp_path / "h")})
    make_cluster_dirs(paths)
    record = new_record(ClusterSpec(secrets=("HF_TOKEN", "DB")), paths)
    write_config(paths, record.with_(ports={"controller": 1, "gcs": 2, "dashboard": 3}))
    settings = Settings.model_validate_json(paths.controller_config.read_bytes())
    job = JobSpec(entrypoint="true", secrets=("DB", "OWN"))
    reported = attempt_spec(job, job="job-a", n=1, epoch="e", settings=settings)
    assert reported["secrets"] == ["HF_TOKEN", "DB", "OWN"]
