"""A host with a real systemd: its units bring the cluster back after a reboot, and are gone after `down`."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from support.booted import BootedHost, booted_host
from support.fittings import add_user, bare_python
from support.hosts import world
from support.terminal import Laptop
from support.waiting import wait_until

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

FILE = """\
name: lab
cpus: 2
hosts:
  - {host: h1, user: ml, key: KEY, gpus: 1}
"""
UNIT = "raylaunch-lab.service"
COUNTS = "for step in $(seq 100000); do echo $RAYLAUNCH_ATTEMPT:$step; sleep 0.5; done"


@pytest.fixture(scope="module")
def host() -> Iterator[BootedHost]:
    with world() as lab:
        made = booted_host(lab)
        bare_python(made)
        add_user(made, "ml")
        yield made


@pytest.fixture(scope="module")
def laptop(host: BootedHost, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    file = FILE.replace("KEY", str(host.users["ml"]))
    made = Laptop(host.world, tmp_path_factory.mktemp("laptop"), file)
    made.call("up", limit_s=600)
    return made


def of_user(host: BootedHost, *words: str) -> str:
    """Ask the account's own systemd."""
    uid = host.out("id -u ml")
    return host.out(f"XDG_RUNTIME_DIR=/run/user/{uid} systemctl --user {' '.join(words)} || true", user="ml")


def test_its_unit_keeps_the_cluster_and_the_account_lingers(laptop: Laptop, host: BootedHost) -> None:
    assert laptop.living() == {"h1"}
    assert of_user(host, "is-enabled", UNIT) == "enabled"
    assert of_user(host, "is-active", UNIT) == "active"
    assert host.path("/var/lib/systemd/linger/ml").exists()


def test_a_killed_watchdog_is_restarted_by_its_unit(laptop: Laptop, host: BootedHost) -> None:
    assert laptop.living() == {"h1"}
    before = of_user(host, "show", "--property=MainPID", "--value", UNIT)
    host.run(f"kill -KILL {before}")
    wait_until(lambda: of_user(host, "show", "--property=MainPID", "--value", UNIT) not in {before, "0"}, 60, "it runs")
    wait_until(lambda: of_user(host, "is-active", UNIT) == "active", 60, "its unit is active")


def test_after_a_reboot_the_unit_brings_back_cluster_and_job(laptop: Laptop, host: BootedHost) -> None:
    job = laptop.call("submit", "--gpus", "1", "--retries", "1", "--shell", COUNTS).stdout.strip()

    def attempt() -> int:
        done = laptop.call("show", job, "--json", check=False)
        seen = json.loads(done.stdout) if done.returncode == 0 else {}
        return seen["attempts"][-1]["n"] if seen.get("state") == "running" and not seen["unreachable"] else 0

    wait_until(lambda: attempt() == 1, 120, "it runs")
    host.reboot()
    wait_until(lambda: laptop.living() == {"h1"}, 300, "the cluster is back")
    wait_until(lambda: attempt() == 2, 120, "the job is tried again")
    assert of_user(host, "is-active", UNIT) == "active"
    assert "raylaunch.cluster.keep lab" in of_user(host, "status", "--no-pager", UNIT)
    laptop.call("stop", job)


def test_after_down_there_is_no_unit(laptop: Laptop, host: BootedHost) -> None:
    laptop.call("down", "--force", limit_s=300)
    assert of_user(host, "is-enabled", UNIT, "2>&1").startswith("Failed to get unit file state")
    assert host.out("pgrep -f '[r]aylaunch.cluster.keep' || true") == ""


@pytest.fixture
def without_manager(host: BootedHost) -> None:
    """Let the account have no systemd of its own, and a sudo that asks for nothing (as a stand-in, which is setuid)."""
    host.run("loginctl disable-linger ml; systemctl mask --now user@.service; systemctl stop user@$(id -u ml).service")
    host.run("cp /usr/bin/env /usr/local/bin/as-root; chmod 4755 /usr/local/bin/as-root")
    host.write("/usr/local/bin/sudo", '#!/bin/sh\n[ "$1" = -n ] && shift\nexec as-root "$@"\n', mode=0o755)


@pytest.mark.usefixtures("without_manager")
def test_where_the_account_has_no_manager_a_unit_of_the_system_does_the_same(laptop: Laptop, host: BootedHost) -> None:
    unit = "raylaunch-ml-lab.service"
    laptop.call("up", limit_s=600)
    assert host.out(f"systemctl is-enabled {unit}; systemctl is-active {unit}") == "enabled\nactive"
    host.reboot()
    wait_until(lambda: laptop.living() == {"h1"}, 300, "the cluster is back")
    assert "raylaunch.cluster.keep lab" in host.out(f"systemctl status --no-pager {unit}")
    assert host.out("stat -c %U /proc/$(pgrep -f '[r]aylaunch.cluster.keep' | head -n 1)") == "ml"
    laptop.call("down", "--force", limit_s=300)
    assert host.out(f"systemctl is-enabled {unit} 2>&1 || true").startswith("Failed to get unit file state")
