"""A whole `raylaunch up` while the link goes, when ports are taken, and from a second laptop.

What is wrong before anything is done is in test_machines_refused.py, killed clients and bad hosts in
test_machines_faults.py.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import pytest
from support.fittings import bare_world, ray_processes
from support.hosts import Host, World
from support.terminal import Laptop, WatchedRun
from support.waiting import wait_until

from raylaunch.cluster.client_record import load_client
from raylaunch.cluster.hosts.tunnel_client import end_tunnel
from raylaunch.cluster.types import IF_UNKNOWN
from raylaunch.paths import cluster_paths

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

FILE = "name: lab\ngpus: 2\ncpus: 2\nhosts: [h1]\n"
UP_S = 400
QUIET_S = 10
LONGER_THAN_A_CONNECTION_LASTS_S = 30.0
SHORT_S = 6.0
FIXED = 21987
LISTENS = (
    "import socket, time; s = socket.create_server(('127.0.0.1', {port})); print('taken', flush=True); time.sleep(1e6)"
)


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with bare_world(1) as made:
        yield made


@pytest.fixture(scope="module")
def host(lab: World) -> Host:
    return lab.hosts[0]


@pytest.fixture(scope="module")
def laptop(lab: World, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    return Laptop(lab, tmp_path_factory.mktemp("laptop"), FILE)


def cut_at(host: Host, word: str, for_s: float) -> Callable[[str], bool]:
    """Cut the host's link at the first line with that word, for some seconds; nothing is killed."""
    done: list[str] = []

    def report(line: str) -> bool:
        if word in line and not done:
            done.append(line)
            host.cut()
            threading.Timer(for_s, host.restore).start()
        return False

    return report


@pytest.fixture(scope="module")
def cut_up(laptop: Laptop, host: Host) -> WatchedRun:
    """The first `up`: the link goes while wheels are pushed, for longer than a connection lasts."""
    result = laptop.watch("up", limit_s=UP_S, kill_at=cut_at(host, "push: pushed", LONGER_THAN_A_CONNECTION_LASTS_S))
    host.restore()
    return result


@pytest.fixture(scope="module")
def cluster(laptop: Laptop, host: Host, cut_up: WatchedRun) -> Laptop:
    """The second `up`, which goes on: the link goes for a moment while it installs."""
    assert cut_up.status == 1
    result = laptop.watch("up", limit_s=UP_S, kill_at=cut_at(host, "install: ", SHORT_S))
    assert result.status == 0, result.err
    assert result.silence_s < QUIET_S, result.lines
    return laptop


def test_a_connection_cut_while_wheels_are_pushed_is_reported_in_time(cut_up: WatchedRun) -> None:
    assert cut_up.status == 1
    assert "the connection to h1 was lost during: push" in cut_up.err
    assert cut_up.silence_s < QUIET_S, cut_up.lines
    assert "run the same command again" in cut_up.err


def test_the_next_up_goes_on_and_bears_a_link_that_is_back_soon(cluster: Laptop) -> None:
    assert cluster.living() == {"h1"}


def test_from_a_second_laptop_the_same_file_finds_the_cluster_and_its_jobs(
    cluster: Laptop, lab: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    job = cluster.call("submit", "--gpus", "1", "--name", "first", "--", "hostname").stdout.strip()
    cluster.call("wait", job)
    second = Laptop(lab, tmp_path_factory.mktemp("second"), FILE)
    assert f"not started from this machine; {IF_UNKNOWN}" in second.call("status").stdout
    assert "cluster lab was not started from this machine" in second.call("down").stdout
    result = second.watch("up", limit_s=UP_S)
    assert result.status == 0, result.err
    assert "cluster lab is already running, started by root" in result.err
    assert second.call("logs", job).stdout.strip() == "h1"
    anyio.run(end_tunnel, cluster_paths("lab", {"RAYLAUNCH_HOME": str(second.home)}))
    assert cluster.living() == {"h1"}


def test_a_port_in_use_is_reported_and_another_one_is_used(cluster: Laptop, host: Host) -> None:
    known = load_client(cluster_paths("lab", {"RAYLAUNCH_HOME": str(cluster.home)}))
    assert known is not None
    cluster.call("down", limit_s=120)
    with taken(host, known.head_ports["gcs"]), taken(host, known.head_ports["controller"]):
        result = cluster.watch("up", limit_s=UP_S)
    assert result.status == 0, result.err
    for name in ("gcs", "controller"):
        assert f"port {known.head_ports[name]} ({name}) is taken by " in result.err
    assert cluster.living() == {"h1"}
    cluster.call("down", limit_s=120)


def test_a_fixed_port_in_use_is_reported_with_its_owner_and_used_when_free(cluster: Laptop, host: Host) -> None:
    cluster.call("down", limit_s=120)
    cluster.write(f"{FILE}port: {FIXED}\n")
    with taken(host, FIXED) as pid:
        result = cluster.watch("up", limit_s=UP_S)
        assert result.status == 1
        wrong = f"h1: port {FIXED}, which cluster.yaml sets for the controller, is taken there by python3 (pid {pid})"
        assert wrong in result.err
        assert "→ leave port out of cluster.yaml; or end that" in result.err
        assert not ray_processes(host)
    result = cluster.watch("up", limit_s=UP_S)
    cluster.write(FILE)
    assert result.status == 0, result.err
    known = load_client(cluster_paths("lab", {"RAYLAUNCH_HOME": str(cluster.home)}))
    assert known is not None
    assert known.head_ports["controller"] == FIXED


def test_what_a_killed_up_has_started_is_ended_by_down(
    cluster: Laptop, lab: World, host: Host, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cluster.call("down", limit_s=120)
    other = Laptop(lab, tmp_path_factory.mktemp("other"), FILE)
    result = other.watch("up", limit_s=UP_S, kill_at=lambda line: "h1: controller: " in line)
    assert result.status == -signal.SIGKILL
    assert ray_processes(host)
    assert "parts of it may run on h1" in other.call("status").stdout
    other.call("down", limit_s=120)
    wait_until(lambda: not ray_processes(host), 30, "nothing of it runs")


@contextlib.contextmanager
def taken(host: Host, port: int) -> Iterator[int]:
    """Have somebody listen on a port of the host; yields the pid, as the host counts."""
    listen = LISTENS.format(port=port)
    pid = host.out(f'setsid python3 -c "{listen}" >/tmp/{port} 2>&1 </dev/null & echo $!')
    wait_until(partial(_has, host.path(f"/tmp/{port}"), "taken"), 20, f"{port} is taken")  # noqa: S108 -- there
    try:
        yield int(pid)
    finally:
        host.run(f"kill {pid}")


def _has(path: Path, word: str) -> bool:
    return word in path.read_text()
