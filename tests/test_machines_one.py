"""One host of a cluster, as hard to reach and to live on as hosts come.

It stands behind a jump host, the account there is an ordinary one with a start-up file that prints, its Python is of
another minor version than the laptop's, and somebody else's Ray runs there already.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.fittings import (
    PYTHON,
    add_user,
    find_python,
    noisy_shell,
    only_python,
    ray_processes,
    start_foreign_ray,
    this_python,
)
from support.hosts import Host, World, world
from support.terminal import Laptop, WatchedRun
from support.waiting import wait_until

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

MINOR = "3.10" if sys.version_info[:2] != (3, 10) else "3.12"
UP_S = 500
QUIET_S = 10
FOREIGN_JOB = "import time, ray; ray.init(address='127.0.0.1:6399'); print('runs', flush=True); time.sleep(100000)"


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    prefix = find_python(MINOR)
    with world() as made:
        made.host("gate", networks=("front", "back"))
        dgx = made.host("dgx", networks=("back",), jump="gate", share={prefix: PYTHON, **this_python()})
        only_python(prefix, dgx)
        add_user(dgx, "anna")
        noisy_shell(dgx, "anna")
        add_user(dgx, "bob")
        yield made


@pytest.fixture(scope="module")
def host(lab: World) -> Host:
    return lab.hosts[1]


@pytest.fixture(scope="module")
def laptop(lab: World, host: Host, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    text = f"name: lab\ngpus: 4\ncpus: 2\nhosts:\n  - {{host: anna@dgx, key: {host.users['anna']}}}\n"
    return Laptop(lab, tmp_path_factory.mktemp("laptop"), text)


@pytest.fixture(scope="module")
def foreign(host: Host) -> dict[int, float]:
    """Somebody else's Ray with a program of his on it: pids, and when each began."""
    start_foreign_ray(host, user="bob", port=6399)
    python = Path(sys.prefix) / "bin/python"
    host.run(f'cd /tmp; {python} -c "{FOREIGN_JOB}" >/tmp/bobs-job 2>&1 </dev/null &', user="bob")
    wait_until(lambda: "runs" in host.path("/tmp/bobs-job").read_text(), 90, "his program runs")  # noqa: S108 -- there
    return of_user(host, "bob", "gcs_server", "raylet/raylet", "import time, ray")


@pytest.fixture(scope="module")
def first_up(laptop: Laptop, foreign: dict[int, float]) -> WatchedRun:
    assert foreign
    result = laptop.watch("up", limit_s=UP_S)
    assert result.status == 0, result.err
    return result


def of_user(host: Host, user: str, *words: str) -> dict[int, float]:
    """Return a user's processes on a host, as the outside counts them, with when each began.

    With `words`, those in whose command line one of them stands.
    """
    uid = int(host.out(f"id -u {user}"))
    found = {}
    for process in host.processes():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            fits = any(word in line for word in words) if words else bool(line)
            if process.uids().real == uid and fits:
                found[process.pid] = process.create_time()
    return found


def test_it_comes_up_and_reports_something_at_least_every_ten_seconds(first_up: WatchedRun, laptop: Laptop) -> None:
    assert "dgx: job: test job succeeded" in first_up.err
    assert first_up.silence_s < QUIET_S, first_up.lines
    assert laptop.status()["state"] == "running"
    assert laptop.living() == {"dgx"}


def test_it_runs_there_under_the_account_and_its_own_python(first_up: WatchedRun, host: Host) -> None:
    assert first_up.status == 0
    lines = [" ".join(psutil.Process(pid).cmdline()) for pid in of_user(host, "anna")]
    assert any("raylaunch.controller" in line for line in lines)
    assert host.out(f"ls /home/anna/.raylaunch/versions/*/bin/python{MINOR}").count("\n") == 0
    assert not host.out("ls -A /root | grep raylaunch || true")


def test_a_job_holds_logical_gpus_and_its_log_arrives_here(first_up: WatchedRun, laptop: Laptop) -> None:
    assert first_up.status == 0
    words = 'echo $(hostname) $(id -un) $CUDA_VISIBLE_DEVICES; echo kept >"$RAYLAUNCH_OUTPUT_DIR/model"'
    job = laptop.call("submit", "--gpus", "2", "--name", "one", "--", words).stdout.strip()
    assert laptop.call("wait", job).returncode == 0
    assert laptop.call("logs", job).stdout.strip() == "dgx anna 0,1"
    laptop.call("get", job, "model", "--to", "got")
    assert (laptop.folder / "got/model").read_text() == "kept\n"


def test_from_outside_only_sshd_answers(first_up: WatchedRun, host: Host, lab: World) -> None:
    assert first_up.status == 0
    open_to_all = ports(host, "anna")
    assert open_to_all == set(), "Ray and the controller listen on loopback alone"
    assert lab.hosts[0].run(f"exec 3<>/dev/tcp/{host.address}/22", check=False).status == 0
    with socket.socket() as probe:
        probe.settimeout(1)
        assert probe.connect_ex((host.address, 22)) != 0, "from here there is no way but the jump host"


def ports(host: Host, user: str) -> set[int]:
    """Return the ports on which a user's processes listen for other machines."""
    uid = host.out(f"id -u {user}")
    lines = [line for line in host.out("ss -Hltne").splitlines() if f"uid:{uid} " in f"{line} "]
    places = [line.split()[3].rpartition(":") for line in lines]
    return {int(port) for address, _, port in places if "127.0.0.1" not in address and address != "[::1]"}


def test_a_second_up_starts_nothing(first_up: WatchedRun, laptop: Laptop, host: Host) -> None:
    assert first_up.status == 0
    before = ray_processes(host)
    again = laptop.watch("up", limit_s=UP_S)
    assert again.status == 0, again.err
    assert ray_processes(host) == before
    assert "test job" not in again.err


def test_after_down_nothing_of_it_runs_and_somebody_elses_ray_goes_on(
    first_up: WatchedRun, laptop: Laptop, host: Host, foreign: dict[int, float]
) -> None:
    assert first_up.status == 0
    laptop.call("down", limit_s=300)
    wait_until(lambda: not of_user(host, "anna"), 30, "nothing of the account runs")
    assert foreign.items() <= of_user(host, "bob").items()
