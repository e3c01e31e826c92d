"""`raylaunch up` while things break: it is killed at each step, a host is bad, a host stops answering in the middle.

What breaks below `up` is tested where it is: connections in test_ssh*.py, pushing and installing in test_install*.py
and test_machines_install.py, what the probe finds in test_doctor_machines.py and test_checks_*.py.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import psutil
import pytest
from support.fittings import bare_world
from support.hosts import Host, World
from support.terminal import Laptop, WatchedRun
from support.waiting import wait_until

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1200)]

FILE = "name: lab\ngpus: 2\ncpus: 2\nhosts: [h1, h2, h3]\n"
STEPS = {"probe", "wheels", "push", "install", "jobs", "controller", "node", "agent", "nodes", "job"}
UP_S = 400
QUIET_S = 10
MOST_KILLS = 20


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    """Three fresh hosts, of which the last refuses connections."""
    with bare_world(3) as made:
        made.hosts[2].run("kill $(cat /run/sshd.pid)")
        yield made


@pytest.fixture(scope="module")
def laptop(lab: World, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    return Laptop(lab, tmp_path_factory.mktemp("laptop"), FILE)


def step_of(line: str) -> str:
    """Return the name of the step that a line is about, without its host's; empty if it is about none."""
    words = line.split(": ")
    name = words[1] if words[0] in {"h1", "h2", "h3"} and len(words) > 1 else words[0]
    return name if name in STEPS else ""


@pytest.fixture(scope="module")
def killed(laptop: Laptop) -> tuple[list[WatchedRun], set[str]]:
    """One `up` after the other, each killed at the first line of a step at which none was yet; the last one ends."""
    met: set[str] = set()

    def new(line: str) -> bool:
        step = step_of(line)
        first = bool(step) and step not in met
        met.update({step} if step else ())
        return first

    ups: list[WatchedRun] = []
    while not ups or ups[-1].status == -signal.SIGKILL:
        assert len(ups) < MOST_KILLS
        ups.append(laptop.watch("up", limit_s=UP_S, kill_at=new))
    return ups, met


def ours(host: Host) -> dict[str, list[int]]:
    """Return the processes of ours on a host, by what they are."""
    found: dict[str, list[int]] = {
        name: [] for name in ("/gcs_server", "raylet/raylet", "raylaunch.controller --config")
    }
    for process in host.processes():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            for name, pids in found.items():
                if name in line.partition(" --")[0] or name in line[:200]:
                    pids.append(process.pid)
    return found


def test_after_a_kill_at_each_step_the_next_up_completes(
    killed: tuple[list[WatchedRun], set[str]], laptop: Laptop, lab: World
) -> None:
    ups, met = killed
    assert STEPS - met <= {"node", "agent"}, "it was killed at each step, but for those that a host may do meanwhile"
    assert len(ups) > len(met) - 1
    assert not [one.err for one in ups if "from elsewhere" in one.err], "what a killed one began is not another's"
    assert laptop.living() == {"h1", "h2"}
    assert [len(one) for one in ours(lab.hosts[0]).values()] == [1, 1, 1]
    assert [len(one) for one in ours(lab.hosts[1]).values()] == [0, 1, 0]
    for host in ("h1", "h2"):
        job = laptop.call("submit", "--host", host, "--gpus", "1", "--name", "after", "--", "hostname").stdout.strip()
        assert laptop.call("wait", job).returncode == 0
        assert laptop.call("logs", job).stdout.strip() == host


def test_one_bad_host_of_three_is_reported_and_the_others_come_up(killed: tuple[list[WatchedRun], set[str]]) -> None:
    last = killed[0][-1]
    assert last.status == 1
    assert "cluster lab: 1 of 3 hosts failed; h1, h2 came up" in last.err
    assert "h3: connection refused" in last.err.lower() or "nothing listens" in last.err
    assert "then run raylaunch up again" in last.err
    assert max(one.silence_s for one in killed[0]) < QUIET_S, [one.lines for one in killed[0]]


def test_the_next_up_completes_the_cluster_when_the_bad_host_is_fixed(
    killed: tuple[list[WatchedRun], set[str]], laptop: Laptop, lab: World
) -> None:
    assert killed
    before = [ours(host) for host in lab.hosts[:2]]
    lab.hosts[2].run("/usr/sbin/sshd -f /etc/ssh/sshd_config")
    result = laptop.watch("up", limit_s=UP_S)
    assert result.status == 0, result.err
    assert result.silence_s < QUIET_S, result.lines
    assert laptop.living() == {"h1", "h2", "h3"}
    assert [ours(host) for host in lab.hosts[:2]] == before


def test_a_host_that_hangs_in_the_middle_is_given_up_and_the_others_are_proven_well(
    killed: tuple[list[WatchedRun], set[str]], laptop: Laptop, lab: World
) -> None:
    assert killed
    hanging = lab.hosts[2]

    def hang(line: str) -> bool:
        if line.startswith("h3: probe"):
            hanging.signal_sshd(signal.SIGSTOP)
        return False

    result = laptop.watch("up", limit_s=UP_S, kill_at=hang)
    hanging.signal_sshd(signal.SIGCONT)
    assert result.status == 1
    assert "1 of 3 hosts failed; h1, h2 came up" in result.err
    assert result.silence_s < QUIET_S, result.lines
    assert laptop.watch("up", limit_s=UP_S).status == 0


def test_down_ends_all_of_it(killed: tuple[list[WatchedRun], set[str]], laptop: Laptop, lab: World) -> None:
    assert killed
    laptop.call("down", limit_s=300)
    wait_until(lambda: not any(any(ours(host).values()) for host in lab.hosts), 30, "nothing of it runs")
