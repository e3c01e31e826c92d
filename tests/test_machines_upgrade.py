"""A newer raylaunch takes over a cluster of hosts while a job runs there, and its watchdogs restart it afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.fittings import bare_world
from support.hosts import Host, World
from support.terminal import Laptop
from support.waiting import wait_until

from raylaunch.version import __version__

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
NEWER = "99.0.0"
FILE = """\
name: lab
cpus: 2
hosts:
  - {host: h1, gpus: 0}
  - {host: h2, gpus: 1}
"""
UP_S = 500
RAY = "raylaunch.cluster.ray_start start"
CONTROLLER = "raylaunch.controller --config"
WATCHDOG = "raylaunch.cluster.keep"


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with bare_world(2) as made:
        yield made


@pytest.fixture(scope="module")
def older(lab: World, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    """The person's machine with the raylaunch under test, which brought the cluster up."""
    laptop = Laptop(lab, tmp_path_factory.mktemp("laptop"), FILE)
    laptop.call("up", limit_s=UP_S)
    return laptop


@pytest.fixture(scope="module")
def newer(older: Laptop, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    """The same machine after an upgrade of raylaunch there."""
    code = tmp_path_factory.mktemp("newer")
    shutil.copytree(ROOT / "raylaunch", code / "raylaunch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples" / "digits", code / "examples" / "digits")
    shutil.copy(ROOT / "pyproject.toml", code)
    version = code / "raylaunch" / "version.py"
    version.write_text(version.read_text().replace(f'"{__version__}"', f'"{NEWER}"'))
    with (code / "raylaunch" / "agent" / "agent.py").open("a") as file:
        file.write("open(f'/tmp/newer-agent-{os.getpid()}', 'w').close()\n")
    return Laptop(older.lab, older.folder, FILE, code=code)


def ours(host: Host) -> dict[str, tuple[int, str]]:
    """Return what runs of the cluster on a host: pid, and the version in whose environment it runs."""
    found = {}
    for process in host.processes():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        for what in (RAY, CONTROLLER, WATCHDOG):
            if what in " ".join(words):
                found[what] = (process.pid, words[0].partition("/versions/")[2].partition("-")[0])
    return found


def versions(host: Host) -> dict[str, str]:
    """Return the version in whose environment each program of the cluster runs on a host."""
    return {what: version for what, (_, version) in ours(host).items()}


def test_a_job_goes_on_while_a_newer_raylaunch_takes_its_cluster_over(older: Laptop, newer: Laptop, lab: World) -> None:
    head, worker = lab.hosts
    waits = "echo ready; while ! test -e /tmp/go-on; do sleep 0.2; done; echo done"
    job = older.call("submit", "--host", "h2", "--gpus", "1", "--name", "runs", "--", waits).stdout.strip()
    wait_until(lambda: "ready" in older.call("logs", job).stdout, 120, "the job runs")
    before = [ours(host) for host in lab.hosts]
    assert versions(head) == {RAY: __version__, CONTROLLER: __version__, WATCHDOG: __version__}

    killed = newer.watch("up", limit_s=UP_S, kill_at=lambda line: "ending the previous controller" in line)
    assert killed.status < 0
    newer.call("up", limit_s=UP_S)

    assert [ours(host)[RAY] for host in lab.hosts] == [seen[RAY] for seen in before]
    assert versions(head)[CONTROLLER] == NEWER
    wait_until(lambda: all(versions(host).get(WATCHDOG) == NEWER for host in lab.hosts), 30, "newer watchdogs")
    wait_until(lambda: worker.out("ls /tmp").count("newer-agent"), 60, "a node agent of the newer code")
    wait_until(lambda: newer.living() == {"h1", "h2"}, 60, "both node agents respond")
    worker.run("touch /tmp/go-on")
    assert newer.call("wait", job).returncode == 0
    assert newer.call("logs", job).stdout.split() == ["ready", "done"]
    assert len(json.loads(newer.call("show", job, "--json").stdout)["attempts"]) == 1
    after = newer.call("submit", "--host", "h2", "--gpus", "1", "--name", "after", "--", "echo after").stdout.strip()
    assert newer.call("wait", after).returncode == 0


def test_the_same_up_again_starts_nothing(newer: Laptop, lab: World) -> None:
    newer.call("up", limit_s=UP_S)
    before = [ours(host) for host in lab.hosts]
    newer.call("up", limit_s=UP_S)
    assert [ours(host) for host in lab.hosts] == before


def test_an_older_raylaunch_is_refused_with_the_fix(older: Laptop, newer: Laptop, lab: World) -> None:
    newer.call("up", limit_s=UP_S)
    before = [ours(host) for host in lab.hosts]
    refused = older.call("up", limit_s=UP_S, check=False)
    assert refused.returncode == 1
    assert f"cluster lab was started by raylaunch {NEWER}, and this is {__version__}" in refused.stderr
    assert f"upgrade raylaunch here to {NEWER}" in refused.stderr
    assert [ours(host) for host in lab.hosts] == before


def test_what_dies_is_started_again_from_the_newer_environment(newer: Laptop, lab: World) -> None:
    newer.call("up", limit_s=UP_S)
    for host, what in ((lab.hosts[0], CONTROLLER), (lab.hosts[1], RAY), (lab.hosts[0], RAY)):
        pid, _ = ours(host)[what]
        psutil.Process(pid).kill()
        wait_until(lambda h=host, w=what, p=pid: ours(h).get(w, (p,))[0] != p, 120, f"{what} runs again")  # type: ignore[misc]
        assert versions(host)[what] == NEWER
    wait_until(lambda: newer.living() == {"h1", "h2"}, 180, "both hosts are back")
