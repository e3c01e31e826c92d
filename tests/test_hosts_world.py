"""The test world itself: that its hosts are what tests take them for."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from support.hosts import Host, World, world
from support.waiting import wait_until

from raylaunch.cluster.ssh import machine

pytestmark = pytest.mark.machines


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with world(2) as made:
        yield made


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def answers(host: Host) -> bool:
    """Whether its sshd can be reached from here."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host.address, 22)) == 0


@pytest.mark.anyio
async def test_a_host_is_entered_over_ssh_with_the_laptops_configuration_alone(lab: World) -> None:
    async with machine(lab.hosts[0].target()) as there:
        assert (await there.run(["hostname"], limit_s=10)).text == "h1"


def test_hosts_know_each_others_names_and_have_no_route_out(lab: World) -> None:
    first, second = lab.hosts
    assert first.out("getent hosts h2").split()[0] == second.address
    assert "default" not in first.out("ip route; ip -6 route")


def test_a_host_sees_nothing_of_this_machines_own(lab: World) -> None:
    host = lab.hosts[0]
    host.write("/root/mine", "x")
    assert host.out("ls -A /root /home /work /opt 2>/dev/null | grep -v '^/' | sort -u").split() == [
        ".bashrc",
        ".profile",
        ".ssh",
        "mine",
    ]
    assert lab.hosts[1].run("ls /root/mine", check=False).status != 0


def test_a_host_that_was_powered_off_has_its_files_again_and_nothing_else() -> None:
    with world(1) as own:
        host = own.hosts[0]
        host.run("echo kept > /root/a; echo kept > /etc/b; echo gone > /tmp/c; sleep 1000 >/dev/null 2>&1 &")
        host.power_off()
        assert not answers(host)
        host.boot()
        assert answers(host)
        assert host.out("cat /root/a /etc/b; ls /tmp") == "kept\nkept"
        assert "sleep 1000" not in host.out("ps -ef | grep -v grep")


def test_a_cut_link_loses_everything_in_both_directions_until_it_is_mended() -> None:
    with world(1) as own:
        host = own.hosts[0]
        host.cut()
        assert not answers(host)
        assert host.run(f"timeout 2 bash -c 'echo > /dev/tcp/{own.front.four}.1/22'", check=False).status == 124
        host.restore()
        wait_until(lambda: answers(host), 20, "it answers again")
