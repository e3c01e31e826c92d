"""Two hosts whose cluster was started by raylaunch 0.1.0: an `up` of this one takes it over, and its jobs go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from support import older
from support.fittings import bare_world
from support.hosts import Host, World
from support.terminal import Laptop
from support.waiting import wait_until

from raylaunch.version import __version__

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

FILE = """\
name: lab
cpus: 2
hosts:
  - {host: h1, gpus: 0}
  - {host: h2, gpus: 2}
"""
UP_S = 500


@dataclass(frozen=True)
class Upgraded:
    """The cluster after its upgrade; its processes of before, by host; and the jobs that it had before."""

    laptop: Laptop
    before: tuple[dict[str, int], ...]
    tunnel: int
    up: str
    runs: str
    fails: str
    waits: str


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with bare_world(2) as made:
        yield made


@pytest.fixture(scope="module")
def upgraded(lab: World, tmp_path_factory: pytest.TempPathFactory) -> Upgraded:
    folder = tmp_path_factory.mktemp("laptop")
    laptop = Laptop(lab, folder, FILE, python=str(older.install(tmp_path_factory.mktemp("older"))))
    laptop.call("up", limit_s=UP_S)
    code = folder / "code"
    code.mkdir()
    (code / "train.py").write_text(older.TRAINS)

    def submit(name: str, *options: str) -> str:
        words = ("--name", name, "--gpus", "1", "--cpus", "0.5", "--working-dir", str(code), *options)
        return laptop.call("submit", *words, "--env", "GO_ON=/tmp/go-on", "--", "python", "train.py").stdout.strip()

    runs, fails = submit("runs"), submit("fails", "--retries", "1", "--env", "FAILS=1")
    for job in (runs, fails):
        wait_until(lambda job=job: "halfway" in laptop.call("logs", job).stdout, 180, f"{job} runs")  # type: ignore[misc]
    waits = submit("waits")
    before, tunnel = tuple(programs(host) for host in lab.hosts), tunnel_of(laptop)
    for host in lab.hosts:
        assert set(programs(host)) == {"ray", "watchdog", "agent"} | ({"controller"} if host is lab.hosts[0] else set())
        assert crontab(host) == [older.VERSION]
    laptop.python = Laptop(lab, folder, FILE).python
    output = laptop.call("up", limit_s=UP_S).stderr
    return Upgraded(laptop, before, tunnel, output, runs, fails, waits)


MODULES = {
    "raylaunch.cluster.ray_start": "ray",
    "raylaunch.controller": "controller",
    "raylaunch.cluster.keep": "watchdog",
}
"""What 0.1.0 starts on hosts, by the module that it names."""


def programs(host: Host) -> dict[str, int]:
    """Return the pids of what of 0.1.0 runs on a host."""
    found = {}
    for process in host.processes():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words[:1] and words[0].startswith(("ray::NodeAgent", "ray::Steward")):
            found["agent"] = process.pid
        elif f"/versions/{older.VERSION}-" in "".join(words[:1]) and words[1:2] == ["-m"] and words[2] in MODULES:
            found[MODULES[words[2]]] = process.pid
    return found


def crontab(host: Host) -> list[str]:
    """Return the version of raylaunch that each of cron's lines starts at boot."""
    lines = host.out("crontab -l").splitlines()
    return [line.partition("/versions/")[2].partition("-")[0] for line in lines if "raylaunch" in line]


def tunnel_of(laptop: Laptop) -> int:
    """Return the pid of the laptop's tunnel."""
    return int(json.loads((laptop.home / "clusters/lab/tunnel.json").read_text())["process"]["pid"])


def job(laptop: Laptop, ref: str) -> dict[str, Any]:
    """Return a job when it has ended."""
    laptop.call("wait", ref, limit_s=240, check=False)
    found = json.loads(laptop.call("show", ref, "--json").stdout)
    assert isinstance(found, dict)
    return found


def losses(laptop: Laptop, ref: str) -> list[float]:
    """Return the metric that a job gave to W&B, step by step."""
    csv = laptop.call("metrics", ref, "--key", "loss", "--csv").stdout.splitlines()
    return [float(line.rpartition(",")[2]) for line in csv[1:]]


def test_what_0_1_0_started_is_replaced_on_every_host_and_its_rays_are_not(upgraded: Upgraded, lab: World) -> None:
    head, worker = lab.hosts
    for host, before in zip(lab.hosts, upgraded.before, strict=True):
        wait_until(lambda host=host: "watchdog" not in programs(host), 60, f"{host.name}: its watchdog has ended")  # type: ignore[misc]
        after = programs(host)
        assert after.pop("ray") == before["ray"]
        assert after.pop("agent", 0) != before["agent"]  # of this raylaunch, it may have another name
        assert not after
        assert crontab(host) == [__version__]
        listed = host.out("ps -e -o args= | grep '[-]m raylaunch' | grep -c /versions/" + __version__)
        assert int(listed) == (2 if host is head else 1)
    assert upgraded.laptop.living() == {head.name, worker.name}


def test_the_tunnel_of_0_1_0_is_replaced(upgraded: Upgraded) -> None:
    assert not psutil.pid_exists(upgraded.tunnel)
    assert psutil.pid_exists(tunnel_of(upgraded.laptop))


def test_jobs_go_on_and_end_with_all_they_wrote(upgraded: Upgraded, lab: World) -> None:
    laptop = upgraded.laptop
    assert json.loads(laptop.call("show", upgraded.waits, "--json").stdout)["state"] == "queued"
    lab.hosts[1].run("touch /tmp/go-on")
    runs = job(laptop, upgraded.runs)
    assert (runs["state"], len(runs["attempts"])) == ("succeeded", 1), runs["message"]
    assert older.output(laptop.call("logs", upgraded.runs).stdout) == older.lines(0)
    assert losses(laptop, upgraded.runs) == pytest.approx(older.LOSSES)
    laptop.call("get", upgraded.runs, "--to", "got")
    assert [path.read_text() for path in (laptop.folder / "got").rglob("model.txt")] == ["trained"]


def test_a_job_that_fails_after_it_is_tried_again_from_its_checkpoint(upgraded: Upgraded, lab: World) -> None:
    lab.hosts[1].run("touch /tmp/go-on")
    fails = job(upgraded.laptop, upgraded.fails)
    assert (fails["state"], len(fails["attempts"])) == ("succeeded", 2), fails["message"]
    assert older.output(upgraded.laptop.call("logs", upgraded.fails).stdout) == older.lines(older.HALF)


def test_a_job_that_waited_meanwhile_runs(upgraded: Upgraded, lab: World) -> None:
    lab.hosts[1].run("touch /tmp/go-on")
    assert job(upgraded.laptop, upgraded.waits)["state"] == "succeeded"
    assert older.output(upgraded.laptop.call("logs", upgraded.waits).stdout) == older.lines(0)


def test_what_exits_is_restarted_by_the_newer_watchdog(upgraded: Upgraded, lab: World) -> None:
    (ray,) = (one["ray"] for one in upgraded.before[1:])
    psutil.Process(ray).kill()
    wait_until(lambda: "ray" not in programs(lab.hosts[1]), 60, "Ray of 0.1.0 is gone")
    wait_until(lambda: upgraded.laptop.living() == {"h1", "h2"}, 180, "the worker is back")
