"""A start of Ray waits for its node as long as the raylet lives, however busy the machine is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.ray_head import PORT_FLAGS
from support.sshd import listening
from support.waiting import wait_until

from raylaunch.cluster.local.ray_start import AGENT_PORTS, patient, ports_first, raylet_lives
from raylaunch.cluster.ports import LOOPBACK, free_ports

NAMES = {argument: argument.upper() for argument in AGENT_PORTS}


def started(*, metrics: bool) -> tuple[list[tuple[str, str, str, int]], str]:
    """Start a raylet of which two ports are known; return what was written down before, and what it returned."""
    written: list[tuple[str, str, str, int]] = []

    def persist(folder: str, node: str, name: str, port: int) -> None:
        written.append((folder, node, name, port))

    def start_raylet(
        node_id: str, session_dir: str, metrics_export_port: int = 0, runtime_env_agent_port: int | None = None
    ) -> str:
        assert len(written) == 2
        return f"{node_id} in {session_dir} with {metrics_export_port} and {runtime_env_agent_port}"

    start = ports_first(start_raylet, persist, NAMES, metrics=metrics)
    return written, start("n1", "session", metrics_export_port=23, runtime_env_agent_port=42)


def test_the_ports_of_the_agents_are_written_down_before_the_raylet_starts() -> None:
    written, output = started(metrics=True)
    folder = "session"
    assert written == [
        (folder, "n1", "METRICS_EXPORT_PORT", 23),
        (folder, "n1", "RUNTIME_ENV_AGENT_PORT", 42),
    ]
    assert output == f"n1 in {folder} with 23 and 42"


def test_where_no_metrics_are_exported_that_is_written_down() -> None:
    assert [port for *_, port in started(metrics=False)[0]] == [-1, 42]


class Gcs:
    """Lists the node at the so manyth question."""

    def __init__(self, listed_at: int) -> None:
        self.listed_at = listed_at
        self.asked: list[tuple[str, str]] = []

    def get_node(self, gcs_address: str, node_id: str) -> dict[str, str]:
        self.asked.append((gcs_address, node_id))
        if len(self.asked) < self.listed_at:
            msg = "This node has no node info"
            raise RuntimeError(msg)
        return {"node_id": node_id}


def test_a_node_that_is_late_is_waited_for_as_long_as_its_raylet_lives() -> None:
    gcs = Gcs(listed_at=5)
    assert patient(gcs.get_node, starting=lambda: True, poll_s=0.01)("127.0.0.1:6379", "n1") == {"node_id": "n1"}
    assert gcs.asked == [("127.0.0.1:6379", "n1")] * 5


def test_without_a_raylet_nothing_is_waited_for() -> None:
    gcs = Gcs(listed_at=2)
    with pytest.raises(RuntimeError, match="no node info"):
        patient(gcs.get_node, starting=lambda: False)("127.0.0.1:6379", "n1")
    assert len(gcs.asked) == 1


def test_patience_has_an_end() -> None:
    with pytest.raises(RuntimeError, match="no node info"):
        patient(Gcs(listed_at=2).get_node, starting=lambda: True, patience_s=-1)("127.0.0.1:6379", "n1")


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child of this process that is called so."""
    (tmp_path / "raylet").symlink_to("/bin/sleep")
    with subprocess.Popen([tmp_path / "raylet", "60"]) as running:
        yield running
        running.kill()


def test_a_raylet_is_a_child_that_is_called_so_and_runs(raylet: subprocess.Popen[bytes]) -> None:
    assert raylet_lives()
    raylet.kill()
    raylet.wait()
    assert not raylet_lives()


LATE_AGENTS = """
import sys, time
if any(word.endswith(("dashboard/agent.py", "runtime_env/agent/main.py")) for word in sys.orig_argv):
    time.sleep(20)
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="rl-") as folder:
        yield Path(folder)


@pytest.mark.ray
@pytest.mark.long
def test_ray_comes_up_though_its_agents_take_longer_than_the_raylet_waits(tmp_path: Path, short_path: Path) -> None:
    """Without `ray_start` Ray 2.60 is ended here, after 15 s, with "timed out during startup"."""
    (tmp_path / "sitecustomize.py").write_text(LATE_AGENTS)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    environ = {**kept, "PYTHONPATH": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    argv = [sys.executable, "-m", "raylaunch.cluster.ray_start", "start", "--head", "--block", "--num-gpus=0"]
    argv += [f"--node-ip-address={LOOPBACK}", f"--temp-dir={short_path}"]
    ports = dict(zip(PORT_FLAGS, free_ports(len(PORT_FLAGS)), strict=True))
    argv += [f"--{name}={port}" for name, port in ports.items()]
    log = tmp_path / "ray.log"
    with log.open("wb") as out, subprocess.Popen(argv, env=environ, stdout=out, stderr=out) as ray:
        try:
            wait_until(lambda: "Ray runtime started" in log.read_text() or ray.poll(), 120, "Ray is up, or has ended")
            agent = ports["dashboard-agent-listen-port"]
            wait_until(lambda: listening(agent) or ray.poll(), 60, "an agent listens, or Ray has ended")
            assert ray.poll() is None, log.read_text()
        finally:
            started = psutil.Process(ray.pid).children(recursive=True) if ray.poll() is None else []
            ray.terminate()
            ray.wait(60)
            for process in psutil.wait_procs(started, 20)[1]:
                process.kill()
