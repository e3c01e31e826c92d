"""The embedded cluster with a real Ray and a real controller. One cluster serves all tests; the last ends it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import psutil
import pytest
from support.waiting import wait_until

from raylaunch.cluster.local import backend
from raylaunch.cluster.local.health import http_request
from raylaunch.cluster.local.process_sweep import of_controller, of_ray
from raylaunch.cluster.ports import RAY_PORTS, is_free
from raylaunch.cluster.processes import ProcessIdentity, identify, is_alive
from raylaunch.cluster.record import ClusterRecord, load_record
from raylaunch.cluster.types import Step
from raylaunch.models.cluster import ClusterStatus
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths, cluster_paths

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SPEC = ClusterSpec(gpus=2, labels={"team": "vision"})
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@dataclass
class Cluster:
    """The cluster of this module."""

    paths: ClusterPaths
    first: tuple[ClusterStatus, ClusterStatus]
    """What the two `up`s returned that started it at once."""

    @property
    def record(self) -> ClusterRecord:
        record = load_record(self.paths)
        assert record is not None
        return record

    def processes(self) -> list[ProcessIdentity]:
        record = self.record
        return [*of_ray(record.cluster_id, record.ray, self.paths.temp), *of_controller(record.cluster_id)]

    def ray_token(self) -> str:
        return self.paths.ray_token.read_text()


def silent(_step: Step) -> None:
    """Take a step and say nothing."""


def up(steps: list[Step] | None = None) -> ClusterStatus:
    return anyio.run(partial(backend.up, SPEC, on_step=silent if steps is None else steps.append))


def status() -> ClusterStatus:
    return anyio.run(backend.status, SPEC)


async def two_ups_at_once() -> list[ClusterStatus]:
    done: list[ClusterStatus] = []

    async def one() -> None:
        done.append(await backend.up(SPEC, on_step=silent))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one)
        tasks.start_soon(one)
    return done


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    home = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAYLAUNCH_HOME", str(home))
        paths = cluster_paths(SPEC.name)
        try:
            one, other = anyio.run(two_ups_at_once)
            yield Cluster(paths, (one, other))
        finally:
            anyio.run(backend.down, SPEC)
            shutil.rmtree(paths.temp, ignore_errors=True)
            shutil.rmtree(home, ignore_errors=True)


def pids(found: ClusterStatus) -> tuple[int, int]:
    assert found.ray is not None
    assert found.controller is not None
    return found.ray.pid, found.controller.pid


def kill(process: ProcessIdentity | None) -> ProcessIdentity:
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(process), 60, "its death")
    return process


def test_up_returns_when_the_cluster_can_take_jobs(cluster: Cluster) -> None:
    found = cluster.first[0]
    assert (found.state, found.problems, found.gpus_logical) == ("running", (), True)
    (node,) = [node for node in found.nodes if node.alive]
    assert node.steward
    assert node.gpus == 2


def test_two_ups_at_once_give_one_cluster(cluster: Cluster) -> None:
    assert pids(cluster.first[0]) == pids(cluster.first[1])


def test_up_on_a_healthy_cluster_changes_nothing(cluster: Cluster) -> None:
    before = cluster.record
    steps: list[Step] = []
    up(steps)
    assert cluster.record == before
    assert [step.state for step in steps] == ["kept", "kept"]


def test_a_running_cluster_that_differs_from_the_spec_is_kept_and_the_difference_said(cluster: Cluster) -> None:
    steps: list[Step] = []
    changed = SPEC.model_copy(update={"gpus": 4})
    anyio.run(partial(backend.up, changed, on_step=steps.append))
    assert cluster.record.spec == SPEC
    assert steps[-1].message.startswith("it runs with gpus: 2, not 4; ")


def test_nothing_of_the_cluster_listens_beyond_loopback(cluster: Cluster) -> None:
    found = cluster.processes()
    assert len(found) > 5
    sockets = [one for process in found for one in psutil.Process(process.pid).net_connections(kind="inet")]
    listening = [one for one in sockets if one.status == psutil.CONN_LISTEN or not one.raddr]
    assert len(listening) > 8
    assert {one.laddr.ip for one in listening if one.laddr} <= LOOPBACK


def test_a_request_without_the_token_gets_401(cluster: Cluster) -> None:
    ports = cluster.record.ports
    assert anyio.run(partial(http_request, ports["dashboard"], "/api/jobs/", token="")).status == 401
    assert anyio.run(partial(http_request, ports["controller"], "/v1/status", token="")).status == 401


def test_ray_and_the_controller_have_tokens_of_their_own(cluster: Cluster) -> None:
    ports = cluster.record.ports
    assert anyio.run(partial(http_request, ports["dashboard"], "/api/jobs/", token=cluster.ray_token())).status == 200
    assert anyio.run(partial(http_request, ports["controller"], "/v1/status", token=cluster.ray_token())).status == 401


def test_no_token_is_in_any_process_argument_or_environment(cluster: Cluster) -> None:
    secrets = (cluster.ray_token(), cluster.paths.token.read_text())
    for one in cluster.processes():
        process = psutil.Process(one.pid)
        text = " ".join([*process.cmdline(), *process.environ().values()])
        assert not any(secret in text for secret in secrets)


def test_every_file_of_the_cluster_is_ours_alone(cluster: Cluster) -> None:
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
def test_a_second_cluster_in_another_home_lives_beside_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pids(status())
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as home, monkeypatch.context() as environment:
        environment.setenv("RAYLAUNCH_HOME", home)
        other = cluster_paths(SPEC.name)
        try:
            second = up()
            assert second.state == "running"
            assert not set(second.ray_ports.values()) & set(cluster.record.ports.values())
        finally:
            anyio.run(backend.down, SPEC)
            shutil.rmtree(other.temp, ignore_errors=True)
    assert pids(status()) == before
    assert status().state == "running"


def test_a_killed_controller_is_found_and_started_again_beside_the_same_ray(cluster: Cluster) -> None:
    before = cluster.record
    killed = kill(before.controller)
    assert status().problems == (f"the controller (pid {killed.pid}) has exited",)
    assert up().state == "running"
    after = cluster.record
    assert after.ray == before.ray
    assert after.controller != before.controller
    assert after.ports == before.ports


def test_a_killed_ray_is_found_and_started_again_with_the_same_ports_and_the_same_controller(cluster: Cluster) -> None:
    before = cluster.record
    kill(before.ray)
    assert up().state == "running"
    after = cluster.record
    assert is_alive(after.ray)
    assert after.controller == before.controller
    assert {key: after.ports[key] for key in (*RAY_PORTS, "controller")} == {
        key: before.ports[key] for key in (*RAY_PORTS, "controller")
    }


@pytest.mark.long
def test_a_killed_ray_is_revived_by_the_program_that_the_controller_runs(cluster: Cluster) -> None:
    before = cluster.record
    kill(before.ray)
    argv = json.loads(cluster.paths.controller_config.read_text())["revive"]
    assert argv == [sys.executable, "-m", "raylaunch.cluster.revive", SPEC.name]
    root = Path(backend.__file__).parents[3]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(root)}, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cluster.record.controller == before.controller
    wait_until(lambda: status().state == "running", 120, "a healthy cluster")


def test_down_ends_all_that_it_started_and_what_jobs_left_behind_and_the_store_stays(cluster: Cluster) -> None:
    marker = cluster.paths.home / "stray.pid"
    script = f"setsid sh -c 'echo $$ > {marker}.new; mv {marker}.new {marker}; exec sleep 1000' & exec sleep 1000"
    submit(cluster, script)
    wait_until(marker.exists, 120, "the job's child")
    stray = identify(int(marker.read_text()))
    found, ports = cluster.processes(), cluster.record.ports
    report = anyio.run(backend.down, SPEC)
    assert stray is not None
    assert not is_alive(stray)
    assert not any(is_alive(process) for process in found)
    assert report.notes == ()
    assert all(is_free(port) for port in ports.values())
    assert "still there" not in str(report)
    assert Path(report.store, "tokens.json").exists()
    assert status().state == "stopped"
    assert not anyio.run(backend.down, SPEC).was_running


def submit(cluster: Cluster, script: str) -> None:
    body = json.dumps({"entrypoint": script}).encode()
    headers = {"Authorization": f"Bearer {cluster.ray_token()}", "Content-Type": "application/json"}
    url = f"http://127.0.0.1:{cluster.record.ports['dashboard']}/api/jobs/"
    request = urllib.request.Request(url, data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 -- as above
        assert answer.status == 200
