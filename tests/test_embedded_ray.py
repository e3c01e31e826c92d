"""The embedded cluster with a real Ray and a real controller. Other files break it afterwards."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anyio
import psutil
import pytest
from support.cluster import Cluster
from support.signals import kill
from support.waiting import wait_until

from raylaunch.cluster.local import backend
from raylaunch.cluster.local.health import http_request
from raylaunch.cluster.ports import RAY_PORTS
from raylaunch.cluster.processes import ProcessIdentity, is_alive, of_controller, of_ray
from raylaunch.cluster.types import Step
from raylaunch.models.cluster import ClusterStatus
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import cluster_paths

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module")
def cluster(broken: Cluster) -> Iterator[Cluster]:
    """The cluster, which is that of this process too."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAYLAUNCH_HOME", str(broken.home))
        yield broken


def processes(cluster: Cluster) -> list[ProcessIdentity]:
    record = cluster.record()
    return [*of_ray(record.cluster_id, record.ray, cluster.paths.temp), *of_controller(record.cluster_id)]


def silent(_step: Step) -> None:
    """Take a step and report nothing."""


def up(spec: ClusterSpec, steps: list[Step] | None = None) -> ClusterStatus:
    return anyio.run(partial(backend.up, spec, on_step=silent if steps is None else steps.append))


def status(cluster: Cluster) -> ClusterStatus:
    return anyio.run(backend.status, cluster.record().spec)


def pids(found: ClusterStatus) -> tuple[int, int]:
    assert found.ray is not None
    assert found.controller is not None
    return found.ray.pid, found.controller.pid


def test_up_returns_when_the_cluster_accepts_jobs(cluster: Cluster) -> None:
    found = cluster.first_ups[0]
    assert (found["state"], found["problems"], found["gpus_logical"]) == ("running", [], True)
    (node,) = [node for node in found["nodes"] if node["alive"]]
    assert node["steward"]
    assert node["gpus"] == 4


def test_two_ups_at_once_give_one_cluster(cluster: Cluster) -> None:
    one, other = ((found["ray"]["pid"], found["controller"]["pid"]) for found in cluster.first_ups)
    assert one == other


def test_up_on_a_healthy_cluster_changes_nothing(cluster: Cluster) -> None:
    before = cluster.record()
    steps: list[Step] = []
    up(before.spec, steps)
    assert cluster.record() == before
    assert [step.state for step in steps] == ["kept", "kept"]


def test_a_running_cluster_that_differs_from_the_spec_is_kept_and_the_difference_reported(cluster: Cluster) -> None:
    steps: list[Step] = []
    spec = cluster.record().spec
    up(spec.model_copy(update={"gpus": 6}), steps)
    assert cluster.record().spec == spec
    assert "gpus: 4, not 6" in steps[-1].message


def test_the_cluster_listens_on_loopback_only(cluster: Cluster) -> None:
    found = processes(cluster)
    assert len(found) > 5
    sockets = [one for process in found for one in psutil.Process(process.pid).net_connections(kind="inet")]
    listening = [one for one in sockets if one.status == psutil.CONN_LISTEN or not one.raddr]
    assert len(listening) > 8
    assert {one.laddr.ip for one in listening if one.laddr} <= LOOPBACK


def test_a_request_without_the_token_gets_401(cluster: Cluster) -> None:
    ports = cluster.record().ports
    assert anyio.run(partial(http_request, ports["dashboard"], "/api/jobs/", token="")).status == 401
    assert anyio.run(partial(http_request, ports["controller"], "/v1/status", token="")).status == 401


def test_ray_and_the_controller_have_tokens_of_their_own(cluster: Cluster) -> None:
    ports, token = cluster.record().ports, cluster.paths.ray_token.read_text()
    assert anyio.run(partial(http_request, ports["dashboard"], "/api/jobs/", token=token)).status == 200
    assert anyio.run(partial(http_request, ports["controller"], "/v1/status", token=token)).status == 401


def test_no_token_is_in_any_process_argument_or_environment(cluster: Cluster) -> None:
    secrets = (cluster.paths.ray_token.read_text(), cluster.paths.token.read_text())
    for one in processes(cluster):
        process = psutil.Process(one.pid)
        text = " ".join([*process.cmdline(), *process.environ().values()])
        assert not any(secret in text for secret in secrets)


def test_every_file_of_the_cluster_is_private_to_the_user(cluster: Cluster) -> None:
    open_to_others = [
        path for path in cluster.paths.root.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o077
    ]
    closed = (cluster.paths.gcs, cluster.paths.node)
    assert [path for path in open_to_others if not any(folder in path.parents for folder in closed)] == []
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (*closed, cluster.paths.temp.parent)} == {0o700}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_another_user_can_read_no_log_of_ray(cluster: Cluster) -> None:
    logs = cluster.paths.temp / "session_latest" / "logs"
    assert logs.is_dir()
    done = subprocess.run(
        ["ls", logs], user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False, cwd="/"
    )
    assert "Permission denied" in done.stderr


@pytest.mark.long
def test_a_second_cluster_in_another_home_runs_next_to_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    before, spec = pids(status(cluster)), cluster.record().spec
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as home, monkeypatch.context() as environment:
        environment.setenv("RAYLAUNCH_HOME", home)
        other = cluster_paths(spec.name)
        try:
            second = up(spec)
            assert second.state == "running"
            assert not set(second.ray_ports.values()) & set(cluster.record().ports.values())
        finally:
            anyio.run(backend.down, spec)
            shutil.rmtree(other.temp, ignore_errors=True)
    assert pids(status(cluster)) == before
    assert status(cluster).state == "running"


def test_a_killed_controller_is_started_again_next_to_the_same_ray(cluster: Cluster) -> None:
    before = cluster.record()
    killed = kill(before.controller)
    assert status(cluster).problems == (f"the controller (pid {killed.pid}) has exited",)
    assert up(before.spec).state == "running"
    after = cluster.record()
    assert after.ray == before.ray
    assert after.controller != before.controller
    assert after.ports == before.ports


def test_a_killed_ray_is_found_and_started_again_with_the_same_ports_and_the_same_controller(cluster: Cluster) -> None:
    before = cluster.record()
    kill(before.ray)
    assert up(before.spec).state == "running"
    after = cluster.record()
    assert is_alive(after.ray)
    assert after.controller == before.controller
    assert {key: after.ports[key] for key in (*RAY_PORTS, "controller")} == {
        key: before.ports[key] for key in (*RAY_PORTS, "controller")
    }


@pytest.mark.long
def test_a_killed_ray_is_revived_by_the_program_that_the_controller_runs(cluster: Cluster) -> None:
    before = cluster.record()
    kill(before.ray)
    argv = json.loads(cluster.paths.controller_config.read_text())["revive"]
    assert argv == [sys.executable, "-m", "raylaunch.cluster.revive", before.spec.name]
    root = Path(backend.__file__).parents[3]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(root)}, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cluster.record().controller == before.controller
    wait_until(lambda: status(cluster).state == "running", 120, "a healthy cluster")
