"""Bad input on a real cluster, in the words that a person reads."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import psutil
import pytest
from support.cluster import Cluster, Result

from raylaunch.cluster.local.ray_head import installed_ray

pytestmark = pytest.mark.ray


def refused(cluster: Cluster, *words: str, cwd: Path | None = None) -> str:
    """Run a command that must be refused as bad input; return what it said."""
    result = cluster.cli(*words, cwd=cwd)
    assert (result.status, result.out) == (2, ""), result
    return result.err


def test_an_unknown_key_in_a_job_file_is_refused_with_file_line_and_nearest_key(cluster: Cluster) -> None:
    (cluster.work / "job.yaml").write_text("name: x\nentrypoint: python train.py\nresources:\n  gpu: 2\n")
    assert refused(cluster, "submit", "-f", "job.yaml") == (
        "error: job.yaml:4: unknown key 'gpu' in resources (nearest: gpus)\n"
    )


def test_a_missing_working_directory_is_refused(cluster: Cluster) -> None:
    assert refused(cluster, "submit", "--working-dir", "no/such/folder", "--", "python", "train.py") == (
        f"error: the working directory {cluster.work}/no/such/folder does not exist\n"
        "  → give another with --working-dir, or working_dir: in job.yaml\n"
    )


def test_a_gpu_variable_is_refused(cluster: Cluster) -> None:
    words = ("--working-dir", "", "--env", "CUDA_VISIBLE_DEVICES=0", "--", "python", "-m", "train")
    assert refused(cluster, "submit", *words) == (
        "error: --env: CUDA_VISIBLE_DEVICES cannot be set: raylaunch gives each job its GPUs; "
        "ask for them with resources.gpus\n"
    )


def test_a_secret_that_is_not_set_is_refused_with_how_to_set_it(cluster: Cluster) -> None:
    assert refused(cluster, "submit", "--working-dir", "", "--secret", "NOT_SET", "--", "python", "-m", "train") == (
        "error: the secret NOT_SET is not set on cluster local\n  → raylaunch secret set NOT_SET\n"
    )


def in_home_of_its_own(cluster: Cluster, home: Path, *words: str) -> Result:
    work = home / "work"
    return cluster.cli(*words, cwd=work, env={"RAYLAUNCH_HOME": str(home)})


def test_a_used_port_is_reported_with_its_owner_and_nothing_is_started(cluster: Cluster, home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (home / "work").mkdir()
        (home / "work" / "cluster.yaml").write_text(f"kind: local\ngpus: 1\nport: {port}\n")
        result = in_home_of_its_own(cluster, home, "up")
    me = psutil.Process()
    assert (result.status, result.out) == (1, "")
    assert result.err == (
        f"error: port {port} is taken by pid {me.pid} ({me.name()}, user {me.username()}), "
        "but cluster.yaml sets it for the controller\n"
        f"  → end that process, or change or remove port: {port} in cluster.yaml\n"
    )
    mark = f"RAYLAUNCH_HOME={home}"
    assert not [process for process in psutil.process_iter(["environ"]) if mark in str(process.info["environ"])]


def test_a_running_ray_of_another_version_is_reported_with_a_hint(cluster: Cluster) -> None:
    kept = cluster.paths.record.read_text()
    record = json.loads(kept)
    record["versions"]["ray"] = "2.59.1"
    cluster.paths.record.write_text(json.dumps(record))
    try:
        result = cluster.cli("up")
    finally:
        cluster.paths.record.write_text(kept)
    assert (result.status, result.out) == (1, "")
    assert result.err == (
        f"error: cluster local runs Ray 2.59.1, but Ray {installed_ray()} is installed here\n"
        "  → raylaunch up --upgrade restarts the cluster with this Ray once no job runs\n"
    )
